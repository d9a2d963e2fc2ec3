"""The regions' layers: `x += circuit(rms(x)); x += mlp(rms(x))`, with one circuit for cortex and one for memory.

A layer is handed the workspace and its normalised form, and hands back the workspace and what its MLP adds to it: the
addition is done together with the next reader's normalisation, in one pass over memory.

Shape letters: B lanes, T tokens, D workspace width, C neurons a column, K columns, H heads, N head width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.cortex import CortexState
from kernels.cortex_circuit import CortexWeights, cortex_circuit
from kernels.linear import RoundedWeights, full_precision_linear
from kernels.memory_circuit import MemoryWeights, memory_circuit
from kernels.mlp import mlp
from kernels.norm import add_norm
from kernels.relay import relay
from neurogen.brain.config import NUM_TAPS, BrainConfig
from neurogen.brain.dropout import Dropout
from neurogen.brain.state import MemoryState, ShiftedMemoryState
from neurogen.brain.token_shift import TokenShift

TIME_CONSTANTS = (1.5, 200.0)  # tokens
LATERAL_SCALE = 0.5
INITIAL_GO_BIAS = 2.0
HALF_LIVES = {"hippocampus": (5.0, 300.0), "pfc": (300.0, 10_000.0)}  # tokens


class Activity(NamedTuple):
    """How often each neuron of a cortex layer fired and was saturated, `[D]` int32, among this many lane-tokens."""

    num_fired: Tensor
    num_saturated: Tensor
    num_tokens: int


def activation_dtype(x: Tensor) -> torch.dtype:
    """The type projections work in: autocast's where it is on, otherwise the workspace's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Thalamus(nn.Module):
    """Relay of normalised embeddings through four causal taps a channel; a negative second tap passes what is new."""

    def __init__(self, config: BrainConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.taps = nn.Parameter(torch.zeros(NUM_TAPS, config.embedding_dim))
        with torch.no_grad():
            self.taps[0] = 1.0
        self.dropout = Dropout(config.dropout, config.dropout_mask)

    def forward(
        self, input_ids: Tensor, embedding: Tensor, recent_ids: Tensor, document_start: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Ids `[B, T]` to the workspace `[B, T, D]` and the ids to carry on."""
        x, carried = relay(input_ids, embedding, self.taps, recent_ids, document_start, eps=self.eps, backend=backend)
        return self.dropout(x), carried


class SwiGLU(nn.Module):
    """W_out (silu(g) * u) with [g, u] = W_in h (Shazeer 2020)."""

    def __init__(self, config: BrainConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.embedding_dim, 2 * config.mlp_width, bias=False)
        self.out_proj = zero_linear(config.mlp_width, config.embedding_dim)
        self.rounded_weights = (RoundedWeights(), RoundedWeights())

    def forward(self, h: Tensor, backend: str) -> Tensor:
        return mlp(h, self.in_proj.weight, self.out_proj.weight, rounded=self.rounded_weights, backend=backend)


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A projection that starts at zero, so that a new layer is the identity."""
    layer = nn.Linear(in_features, out_features, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


class CortexLayer(nn.Module):
    """Spiking hyper-columns (Wernicke's and Broca's areas)."""

    def __init__(self, config: BrainConfig) -> None:
        super().__init__()
        self.config = config
        width, num_columns, column_width = config.embedding_dim, config.num_columns, config.column_width
        self.in_proj = nn.Linear(width, 2 * width, bias=False)  # drive, then gate
        lateral = torch.randn(num_columns, column_width, column_width) * (LATERAL_SCALE / math.sqrt(column_width))
        if config.lateral:
            self.lateral_weight = nn.Parameter(lateral)
        else:
            self.register_buffer("lateral_weight", torch.zeros_like(lateral), persistent=False)
        self.decay_logit = nn.Parameter(_decay_logits(width)[torch.randperm(width)])
        # A constant drive b settles at the voltage b / sqrt(1 - alpha): one bias for all would leave the slow neurons
        # firing at every token, or never.
        gain = torch.rsqrt(1.0 - torch.sigmoid(self.decay_logit.detach()))
        self.drive_bias = nn.Parameter(config.initial_voltage / gain)
        self.out_proj = zero_linear(width, width)
        self.mlp = SwiGLU(config)
        self.dropout = Dropout(config.dropout, config.dropout_mask)
        self.rounded_weights = (RoundedWeights(), RoundedWeights())

    def init_state(self, lanes: int) -> CortexState:
        shape = (lanes, self.config.embedding_dim)
        dtype = torch.promote_types(self.decay_logit.dtype, torch.float32)
        return CortexState(*(torch.zeros(shape, dtype=dtype, device=self.decay_logit.device) for _ in range(3)))

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        state: CortexState,
        document_start: Tensor | None,
        go: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, CortexState, Activity]:
        """One layer over a sequence.

        Arguments:
            x: the workspace, `[B, T, D]`.
            h: rms(x).
            state: before the first token.
            document_start: `[B, T]` bool or None.
            go: `[B, T, K]`, what the basal ganglia let each column write, or None for all.
            backend: which kernels run.

        Returns:
            The workspace with the circuit's output added, what the MLP adds to it, the next state and the activity.
        """
        config = self.config
        lateral = self.lateral_weight
        assert isinstance(lateral, Tensor)
        weights = CortexWeights(
            self.in_proj.weight, self.drive_bias, lateral, torch.sigmoid(self.decay_logit), self.out_proj.weight
        )
        out = cortex_circuit(
            h,
            weights,
            state,
            document_start,
            go,
            spike_kind=config.spike,
            threshold=config.threshold,
            adaptation_strength=config.adaptation_strength,
            adaptation_decay=config.adaptation_decay,
            eps=config.norm_eps,
            rounded=self.rounded_weights,
            backend=backend,
        )
        written = self.dropout(out.written)
        x, h = add_norm(x, written, eps=config.norm_eps, out_dtype=activation_dtype(x), backend=backend)
        activity = Activity(out.num_fired, out.num_saturated, x.shape[0] * x.shape[1])
        return x, self.dropout(self.mlp(h, backend)), out.state, activity


def _decay_logits(width: int) -> Tensor:
    """logit(exp(-1/tau)), tau spread log-uniformly over TIME_CONSTANTS."""
    shortest, longest = (math.log(tau) for tau in TIME_CONSTANTS)
    return torch.logit(torch.exp(-1.0 / torch.linspace(shortest, longest, width, dtype=torch.float64).exp())).float()


class MemoryLayer(nn.Module):
    """Fast weights that experience writes (hippocampus and prefrontal cortex)."""

    def __init__(self, config: BrainConfig, half_lives: tuple[float, float]) -> None:
        super().__init__()
        self.config = config
        width, num_heads = config.embedding_dim, config.num_heads
        self.shift = TokenShift(width, config.token_shift) if config.token_shift else None
        self.in_proj = nn.Linear(width, 4 * width, bias=False)  # query, key, value, gate
        self.forget = nn.Linear(width, num_heads)
        nn.init.zeros_(self.forget.weight)
        with torch.no_grad():
            self.forget.bias.copy_(_forget_logits(num_heads, half_lives))
        self.write = nn.Linear(width, num_heads) if config.memory_rule == "delta" else None
        if self.write is not None:
            nn.init.zeros_(self.write.bias)
        self.out_proj = zero_linear(width, width)
        self.mlp = SwiGLU(config)
        self.dropout = Dropout(config.dropout, config.dropout_mask)
        self.rounded_weights = (RoundedWeights(), RoundedWeights())

    def init_state(self, lanes: int) -> MemoryState | ShiftedMemoryState:
        config = self.config
        shape = (lanes, config.num_heads, config.head_width, config.head_width)
        dtype = torch.promote_types(self.forget.weight.dtype, torch.float32)
        fast_weight = torch.zeros(shape, dtype=dtype, device=self.forget.weight.device)
        if self.shift is None:
            return MemoryState(fast_weight)
        return ShiftedMemoryState(fast_weight, self.shift.init_recent(lanes))

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        state: MemoryState | ShiftedMemoryState,
        document_start: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, MemoryState | ShiftedMemoryState]:
        """One layer over a sequence; arguments and results as those of `CortexLayer.forward`."""
        config = self.config
        mixed, recent = h, None
        if self.shift is not None:
            assert isinstance(state, ShiftedMemoryState)
            mixed, recent = self.shift(h, state.recent, document_start)
        write, write_bias = (None, None) if self.write is None else (self.write.weight, self.write.bias)
        weights = MemoryWeights(
            self.in_proj.weight, self.forget.weight, self.forget.bias, write, write_bias, self.out_proj.weight
        )
        written, fast_weight = memory_circuit(
            mixed,
            weights,
            state.fast_weight,
            document_start,
            rule=config.memory_rule,
            chunk_size=config.chunk_size,
            eps=config.norm_eps,
            rounded=self.rounded_weights,
            backend=backend,
        )
        written = self.dropout(written)
        x, h = add_norm(x, written, eps=config.norm_eps, out_dtype=activation_dtype(x), backend=backend)
        after = MemoryState(fast_weight) if recent is None else ShiftedMemoryState(fast_weight, recent)
        return x, self.dropout(self.mlp(h, backend)), after


def _forget_logits(num_heads: int, half_lives: tuple[float, float]) -> Tensor:
    """logit(2^(-1/h)), half-life h spread log-uniformly over the heads."""
    shortest, longest = (math.log(h) for h in half_lives)
    lives = torch.linspace(shortest, longest, num_heads, dtype=torch.float64).exp()
    return torch.logit(torch.exp2(-1.0 / lives)).float()


class BasalGanglia(nn.Module):
    """Go / No-Go: how much of each Broca column's activity reaches the workspace."""

    def __init__(self, config: BrainConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.go = nn.Linear(config.embedding_dim, config.num_columns)
        nn.init.zeros_(self.go.weight)
        nn.init.constant_(self.go.bias, INITIAL_GO_BIAS)

    def forward(self, h: Tensor, backend: str = "reference") -> Tensor:
        """The normalised workspace `[B, T, D]` to gates `[B, T, K]` in (0, 1)."""
        return torch.sigmoid(full_precision_linear(h, self.go.weight, self.go.bias, backend=backend))
