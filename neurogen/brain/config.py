"""The shape of a brain."""

from dataclasses import dataclass

from kernels.cortex import SPIKES
from kernels.memory import RULES
from neurogen.brain.dropout import MASKS, check_dropout
from neurogen.errors import UserError

NUM_TAPS = 4
TOKEN_SHIFTS = (0, 2, 3, 4)


@dataclass(frozen=True)
class BrainConfig:
    """Sizes and rules of the six regions; checked when made.

    Arguments:
        embedding_dim: D, width of the workspace; a multiple of column_width and of head_width.
        column_width: C, neurons in a hyper-column.
        head_width: N, width of a memory head.
        wernicke_depth, hippocampus_depth, pfc_depth, broca_depth: layers of each region, >= 0.
        spike: `graded`, `binary`, or `smooth` for a unit tanh(u) to hold the two against. It asks for homeostasis 0,
            and for threshold, adaptation_strength and initial_voltage 0 where nothing of a spike shall be left.
        memory_rule: `hebbian` or `delta`.
        token_shift: taps a channel that mix a memory layer's input with its last tokens, 2 to 4; 0 for none.
        lateral: whether the neurons of a column see each other.
        go_gate: whether the basal ganglia gate what Broca's columns write.
        tie_embedding: whether the decoder's weight is the embedding.
        threshold, adaptation_strength, adaptation_decay: theta, beta and rho of the neurons; rho in [0, 1).
        initial_voltage: mean membrane voltage at the start, by the drive's bias; beside the threshold it sets how many
            neurons fire.
        homeostasis: how strongly training pulls every neuron's drive bias towards `firing_rate`; 0 for not at all.
        firing_rate: the share of tokens at which a neuron should fire, in (0, 1).
        mlp_ratio: hidden width of a layer's SwiGLU over D, rounded to a multiple of 64.
        norm_eps: added to mean squares and squared norms, > 0; not tiny, for the gradient of a norm is up to
            1/sqrt(norm_eps), and a column in which hardly a neuron fires comes near it.
        chunk_size: tokens the memory solves at once, >= 1; a cost, not a meaning.
        dropout: share of numbers left out, in training alone, of the relay's output and of what each circuit and each
            SwiGLU adds to the workspace, in [0, 1). What is carried from token to token is never left out.
        dropout_mask: `token` or `sequence`, see `neurogen.brain.dropout`.
        name: what the configuration calls this kind of model.
    """

    embedding_dim: int = 128
    column_width: int = 64
    head_width: int = 64
    wernicke_depth: int = 1
    hippocampus_depth: int = 1
    pfc_depth: int = 1
    broca_depth: int = 1
    spike: str = "graded"
    memory_rule: str = "hebbian"
    token_shift: int = 0
    lateral: bool = True
    go_gate: bool = True
    tie_embedding: bool = False
    threshold: float = 1.0
    adaptation_strength: float = 0.5
    adaptation_decay: float = 0.95
    initial_voltage: float = 1.0
    homeostasis: float = 0.03
    firing_rate: float = 0.15
    mlp_ratio: float = 8 / 3
    norm_eps: float = 1e-3
    chunk_size: int = 64
    dropout: float = 0.0
    dropout_mask: str = "token"
    name: str = "brain"

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "column_width", "head_width", "chunk_size"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("column_width", "head_width"):
            if self.embedding_dim % getattr(self, name):
                raise UserError(
                    f"model.embedding_dim is {self.embedding_dim}, not a multiple of model.{name} = "
                    f"{getattr(self, name)}; change one of the two"
                )
        for name in ("wernicke_depth", "hippocampus_depth", "pfc_depth", "broca_depth"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be 0 or more")
        for name, choices in (("spike", SPIKES), ("memory_rule", RULES), ("dropout_mask", MASKS)):
            if getattr(self, name) not in choices:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.token_shift not in TOKEN_SHIFTS:
            raise UserError(f"model.token_shift is {self.token_shift}; choose one of 0 (off), 2, 3, 4")
        if not 0 <= self.adaptation_decay < 1:
            raise UserError(f"model.adaptation_decay is {self.adaptation_decay}; it must be in [0, 1)")
        if self.homeostasis < 0:
            raise UserError(f"model.homeostasis is {self.homeostasis}; it must be 0 or more")
        if self.homeostasis and self.spike == "smooth":
            raise UserError(
                f"model.homeostasis is {self.homeostasis}; a smooth unit fires at no rate to be kept: set it to 0, or "
                "model.spike to graded or binary"
            )
        if not 0 < self.firing_rate < 1:
            raise UserError(f"model.firing_rate is {self.firing_rate}; it must be between 0 and 1")
        for name in ("mlp_ratio", "norm_eps"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be above 0")
        check_dropout(self.dropout)

    @property
    def num_columns(self) -> int:
        return self.embedding_dim // self.column_width

    @property
    def num_heads(self) -> int:
        return self.embedding_dim // self.head_width

    @property
    def mlp_width(self) -> int:
        """round64(mlp_ratio D), at least 64."""
        return max(64, round(self.mlp_ratio * self.embedding_dim / 64) * 64)

    @property
    def depths(self) -> dict[str, int]:
        """Layers by region, in the order the workspace passes them."""
        return {
            "wernicke": self.wernicke_depth,
            "hippocampus": self.hippocampus_depth,
            "pfc": self.pfc_depth,
            "broca": self.broca_depth,
        }

    def layer_names(self) -> list[str]:
        """`region.index` of every stateful layer, in order."""
        return [f"{region}.{i}" for region, depth in self.depths.items() for i in range(depth)]
