"""Small random inputs that put one kernel at a time to the test, for the canary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cortex import CortexState, cortex
from kernels.decode import IGNORE_INDEX, decode
from kernels.gated_norm import gated_norm
from kernels.memory import memory
from kernels.relay import NO_TOKEN, relay
from neurogen.brain import BrainConfig

LANES, TOKENS, VOCABULARY = 2, 19, 67
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """One op on one input.

    Arguments:
        op: its name.
        stored: real-valued inputs that a model keeps in its storage type, float32 on the CPU here.
        full: real-valued inputs that stay in float32 whatever the storage type.
        run: from all of them, on one device, and a backend to real-valued outputs by name.
    """

    op: str
    stored: Tensors
    full: Tensors
    run: Callable[[Tensors, str], Tensors]


class _Draw:
    """Normal draws from one seed."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(20)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)


def make_probes(config: BrainConfig) -> list[Probe]:
    """Every op of a brain, each with a carried state and a document start in the middle of a lane."""
    draw = _Draw()
    document_start = torch.zeros(LANES, TOKENS, dtype=torch.bool)
    document_start[0, TOKENS // 2] = True
    return [
        _relay(config, draw, document_start),
        _cortex(config, draw, document_start),
        _memory(config, draw, document_start),
        _gated_norm(config, draw),
        _decode(config, draw),
    ]


def _relay(config: BrainConfig, draw: _Draw, document_start: Tensor) -> Probe:
    ids = draw.integers(VOCABULARY, LANES, TOKENS)
    recent = torch.tensor([[NO_TOKEN, 3, 1], [5, 0, 2]])
    width = config.embedding_dim

    def run(x: Tensors, backend: str) -> Tensors:
        device = x["embedding"].device
        out, _ = relay(
            ids.to(device), x["embedding"], x["taps"], recent.to(device), document_start.to(device), backend=backend
        )
        return {"x": out}

    return Probe("relay", {}, {"embedding": draw(VOCABULARY, width), "taps": draw(4, width)}, run)


def _cortex(config: BrainConfig, draw: _Draw, document_start: Tensor) -> Probe:
    # Two columns and two heads are enough to catch a wrong stride, whatever the width of the brain.
    num_columns, column_width = min(2, config.num_columns), config.column_width
    neurons = num_columns * column_width

    def run(x: Tensors, backend: str) -> Tensors:
        out = cortex(
            x["drive"],
            x["lateral_weight"],
            x["decay"],
            CortexState(x["voltage"], x["adaptation"], x["spikes"]),
            document_start.to(x["drive"].device),
            spike_kind=config.spike,
            threshold=config.threshold,
            adaptation_strength=config.adaptation_strength,
            adaptation_decay=config.adaptation_decay,
            backend=backend,
        )
        return {"spikes": out.spikes, "final voltage": out.state.voltage, "final adaptation": out.state.adaptation}

    # Drives of either sign and short time constants keep neurons far from their threshold and from their ceiling: a
    # spike that rounding flips, or a kink on whose other side it comes to lie, would be no error of the kernel.
    drive = torch.where(draw(LANES, TOKENS, neurons) > 0, 2.5, -2.5) + 0.1 * draw(LANES, TOKENS, neurons)
    lateral = 0.1 * draw(num_columns, column_width, column_width) / column_width**0.5
    state = {name: 0.1 * draw(LANES, neurons) for name in ("voltage", "adaptation", "spikes")}
    decay = 0.05 + 0.15 * torch.rand(neurons, generator=draw.generator)
    return Probe("cortex", {"drive": drive}, {"lateral_weight": lateral, "decay": decay, **state}, run)


def _memory(config: BrainConfig, draw: _Draw, document_start: Tensor) -> Probe:
    num_heads, width = min(2, config.num_heads), config.head_width

    def run(x: Tensors, backend: str) -> Tensors:
        read, state = memory(
            x["query"],
            x["key"],
            x["value"],
            x["forget_logit"],
            x.get("write_logit"),
            x["state"],
            document_start.to(x["query"].device),
            rule=config.memory_rule,
            chunk_size=config.chunk_size,
            backend=backend,
        )
        return {"read": read, "final state": state}

    stored = {name: draw(LANES, TOKENS, num_heads, width) for name in ("query", "key", "value")}
    full = {"forget_logit": 3.0 + draw(LANES, TOKENS, num_heads), "state": draw(LANES, num_heads, width, width)}
    if config.memory_rule == "delta":
        full["write_logit"] = draw(LANES, TOKENS, num_heads)
    return Probe("memory", stored, full, run)


def _gated_norm(config: BrainConfig, draw: _Draw) -> Probe:
    shape = (LANES, TOKENS, min(2, config.num_columns) * config.column_width)

    def run(x: Tensors, backend: str) -> Tensors:
        return {"y": gated_norm(x["x"], x["gate"], group_size=config.column_width, backend=backend)}

    return Probe("gated_norm", {"x": draw(*shape), "gate": draw(*shape)}, {}, run)


def _decode(config: BrainConfig, draw: _Draw) -> Probe:
    width = config.embedding_dim
    targets = draw.integers(VOCABULARY, LANES, TOKENS)
    targets[0, :3] = IGNORE_INDEX

    def run(x: Tensors, backend: str) -> Tensors:
        return {"loss": decode(x["hidden"], x["weight"], targets.to(x["hidden"].device), backend=backend).loss}

    stored = {"hidden": draw(LANES, TOKENS, width), "weight": draw(VOCABULARY, width) / width**0.5}
    return Probe("decode", stored, {}, run)
