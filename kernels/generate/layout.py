"""How a whole brain lies in memory for the generating launch: two flat buffers, so that any depths run one kernel.

`matrices` (bfloat16 or float32) holds, for each layer in the order the workspace passes them, in_proj, out_proj and the
SwiGLU's two projections, row by row; the next matrix a program reads is always the next in memory. `vectors` (float32)
holds what must not be rounded: lateral weights, time constants, biases, forget and write projections, then the basal
ganglia and the taps. Offsets follow from the sizes and the number of layers of each kind.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class BrainShape:
    """Sizes and rules of a brain as the launch sees it: cortex layers, memory layers, gated cortex layers.

    Arguments:
        width: D. column_width: C. head_width: N. mlp_width: M. vocab_size: V. num_taps: J.
        num_wernicke, num_memory, num_broca: layers, in this order.
        spike_kind: `graded` or `binary`; `smooth` in the definition alone. rule: `hebbian` or `delta`.
        go_gate: whether broca's layers are gated.
        threshold, adaptation_strength, adaptation_decay, eps: theta, beta, rho and the norms' epsilon.
    """

    width: int
    column_width: int
    head_width: int
    mlp_width: int
    vocab_size: int
    num_wernicke: int
    num_memory: int
    num_broca: int
    num_taps: int = 4
    spike_kind: str = "graded"
    rule: str = "hebbian"
    go_gate: bool = True
    threshold: float = 0.5
    adaptation_strength: float = 0.5
    adaptation_decay: float = 0.95
    eps: float = 1e-6

    @property
    def num_columns(self) -> int:
        return self.width // self.column_width

    @property
    def num_heads(self) -> int:
        return self.width // self.head_width

    @property
    def num_cortex(self) -> int:
        return self.num_wernicke + self.num_broca

    @property
    def cortex_matrix_size(self) -> int:
        """Elements of a cortex layer in `matrices`: in_proj [2D, D], out_proj [D, D], mlp [2M, D] and [D, M]."""
        return 3 * self.width**2 + 3 * self.mlp_width * self.width

    @property
    def memory_matrix_size(self) -> int:
        """Elements of a memory layer in `matrices`: in_proj [4D, D], out_proj [D, D], mlp [2M, D] and [D, M]."""
        return 5 * self.width**2 + 3 * self.mlp_width * self.width

    @property
    def cortex_vector_size(self) -> int:
        """Elements of a cortex layer in `vectors`: lateral [K, C, C], decay [D], bias [D]; padded."""
        return _aligned(self.width * (self.column_width + 2))

    @property
    def memory_vector_size(self) -> int:
        """Elements of a memory layer in `vectors`: weight [H, D] and bias [H] of forget and (delta) write; padded."""
        return _aligned((2 if self.rule == "delta" else 1) * self.num_heads * (self.width + 1))

    @property
    def matrices_size(self) -> int:
        return self.num_cortex * self.cortex_matrix_size + self.num_memory * self.memory_matrix_size

    @property
    def go_offset(self) -> int:
        """Where in `vectors` the basal ganglia's weight [K, D] and bias [K] begin, padded; the taps [J, D] follow."""
        return self.num_cortex * self.cortex_vector_size + self.num_memory * self.memory_vector_size

    @property
    def taps_offset(self) -> int:
        return self.go_offset + (_aligned(self.num_columns * (self.width + 1)) if self.go_gate else 0)

    @property
    def vectors_size(self) -> int:
        return self.taps_offset + _aligned(self.num_taps * self.width)

    @property
    def num_rows(self) -> int:
        """Rows of all matrices, and of the decoder."""
        mlp_rows = 2 * self.mlp_width + self.width
        cortex_rows, memory_rows = 3 * self.width + mlp_rows, 5 * self.width + mlp_rows
        return self.num_cortex * cortex_rows + self.num_memory * memory_rows + self.vocab_size

    def bytes_per_token(self, *, element_size: int, lanes: int = 1) -> int:
        """Bytes a token must move at least: every weight once, every lane's state read and written once. Weights of
        one byte have a float32 scale a row."""
        weights = (self.matrices_size + self.vocab_size * self.width) * element_size + self.vectors_size * 4
        weights += self.num_rows * 4 if element_size == 1 else 0
        state = self.num_cortex * 3 * self.width + self.num_memory * self.width * self.head_width
        return weights + lanes * state * 8


def _aligned(size: int) -> int:
    """Up to a multiple of 64 elements, so that every block can be read in wide loads."""
    return (size + 63) // 64 * 64


class PackedBrain(NamedTuple):
    """A brain's weights: embedding and decoder `[V, D]`, matrices `[shape.matrices_size]`, all of one type, and vectors
    `[shape.vectors_size]` float32.

    With `scales` the decoder and the matrices are int8, and scales float32: a factor for each row of the matrices, in
    their order, and then of the decoder.
    """

    shape: BrainShape
    embedding: Tensor
    decoder: Tensor
    matrices: Tensor
    vectors: Tensor
    scales: Tensor | None = None


class PackedState(NamedTuple):
    """B lanes' state: position `[B]` and recent_ids `[B, J-1]` int64; cortex `[num_cortex, 3, B, D]` (voltage,
    adaptation, spikes) and fast_weight `[num_memory, B, H, N, N]` float32."""

    position: Tensor
    recent_ids: Tensor
    cortex: Tensor
    fast_weight: Tensor


class GenerateOutput(NamedTuple):
    """Tokens `[B, N]` int64, N the number asked for (after its stop token a lane repeats it), log-probabilities
    `[B, N]` float32 (0 in the repetition), lengths `[B]` int64 up to and including a stop token, and the state, which
    has not read the last token of each lane."""

    tokens: Tensor
    log_probs: Tensor
    lengths: Tensor
    state: PackedState
