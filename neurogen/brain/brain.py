"""The cognitive step: token ids through six regions to Broca's output."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.cortex import CortexState
from kernels.norm import add_norm
from kernels.relay import NO_TOKEN
from neurogen.brain.config import NUM_TAPS, BrainConfig
from neurogen.brain.embedding import TokenEmbedding
from neurogen.brain.regions import (
    HALF_LIVES,
    Activity,
    BasalGanglia,
    CortexLayer,
    MemoryLayer,
    Thalamus,
    activation_dtype,
)
from neurogen.brain.state import BrainState, LayerState, MemoryState, ShiftedMemoryState


@dataclass(frozen=True)
class BrainOutput:
    """What a sequence leaves.

    Arguments:
        broca_output: `[B, T, D]`, for the decoder.
        state: after the last token, its history attached.
        activity: per cortex layer, by name.
        go: `[B, T, K]`, the basal ganglia's gates, or None in a brain without them.
    """

    broca_output: Tensor
    state: BrainState
    activity: dict[str, Activity]
    go: Tensor | None


class Brain(nn.Module):
    """Thalamus, Wernicke's area, hippocampus, prefrontal cortex, basal ganglia and Broca's area, in this order."""

    def __init__(self, config: BrainConfig) -> None:
        super().__init__()
        self.config = config
        self.thalamus = Thalamus(config)
        self.wernicke = nn.ModuleList(CortexLayer(config) for _ in range(config.wernicke_depth))
        self.hippocampus = nn.ModuleList(
            MemoryLayer(config, HALF_LIVES["hippocampus"]) for _ in range(config.hippocampus_depth)
        )
        self.pfc = nn.ModuleList(MemoryLayer(config, HALF_LIVES["pfc"]) for _ in range(config.pfc_depth))
        self.basal_ganglia = BasalGanglia(config) if config.go_gate and config.broca_depth else None
        self.broca = nn.ModuleList(CortexLayer(config) for _ in range(config.broca_depth))

    def layers(self) -> dict[str, nn.Module]:
        """Stateful layers by name, in the order the workspace passes them."""
        return {name: self.get_submodule(name) for name in self.config.layer_names()}

    def cortex_layers(self) -> dict[str, CortexLayer]:
        """The layers of spiking neurons by name, in the order the workspace passes them."""
        return {name: layer for name, layer in self.layers().items() if isinstance(layer, CortexLayer)}

    def init_state(self, lanes: int) -> BrainState:
        """The state before the first token of B lanes, on the parameters' device."""
        device = self.thalamus.taps.device
        return BrainState(
            position=torch.zeros(lanes, dtype=torch.int64, device=device),
            recent_ids=torch.full((lanes, NUM_TAPS - 1), NO_TOKEN, dtype=torch.int64, device=device),
            layers={name: layer.init_state(lanes) for name, layer in self.layers().items()},  # type: ignore[operator]
        )

    def forward(
        self,
        input_ids: Tensor,
        embedding: TokenEmbedding,
        state: BrainState,
        document_start: Tensor | None = None,
        *,
        backend: str = "reference",
    ) -> BrainOutput:
        """Run a whole sequence.

        Arguments:
            input_ids: `[B, T]` int64.
            embedding: the table the relay gathers from.
            state: of B lanes, before the first token.
            document_start: `[B, T]` bool; where true, the lane's state is reset before the token. None for nowhere.
            backend: which kernels run, `reference` or `fused`.
        """
        x, recent_ids = self.thalamus(input_ids, embedding.weight, state.recent_ids, document_start, backend)
        return self.think(x, recent_ids, state, document_start, backend=backend)

    def think(
        self,
        x: Tensor,
        recent_ids: Tensor,
        state: BrainState,
        document_start: Tensor | None = None,
        *,
        backend: str = "reference",
    ) -> BrainOutput:
        """The regions after the thalamus: its output `[B, T, D]` and the ids it carries on to Broca's output."""
        num_tokens, eps = x.shape[1], self.config.norm_eps
        layer_states: dict[str, LayerState] = {}
        activity: dict[str, Activity] = {}
        delta, go = None, None  # what the layer before adds to the workspace, and the gates on Broca
        for name, layer in self.layers().items():
            x, h = add_norm(x, delta, eps=eps, out_dtype=activation_dtype(x), backend=backend)
            layer_state = state.layers[name]
            if isinstance(layer, MemoryLayer):
                assert isinstance(layer_state, MemoryState | ShiftedMemoryState)
                x, delta, layer_states[name] = layer(x, h, layer_state, document_start, backend)
                continue
            assert isinstance(layer_state, CortexState)
            in_broca = name.startswith("broca.")
            if in_broca and go is None and self.basal_ganglia is not None:
                go = self.basal_ganglia(h, backend)
            x, delta, layer_states[name], activity[name] = layer(
                x, h, layer_state, document_start, go if in_broca else None, backend
            )
        if delta is not None:
            x = x + delta
        position = state.position + num_tokens
        return BrainOutput(x, BrainState(position, recent_ids, layer_states), activity, go)

    def step(self, token_ids: Tensor, embedding: TokenEmbedding, state: BrainState) -> tuple[Tensor, BrainState]:
        """One token a lane: ids `[B]` to Broca's output `[B, D]`; the same mathematics as a sequence of length 1."""
        out = self(token_ids[:, None], embedding, state)
        return out.broca_output[:, 0], out.state
