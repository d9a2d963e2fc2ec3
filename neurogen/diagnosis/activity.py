"""What the neurons, gates and memories do on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.cortex import CEILINGS, CortexState
from kernels.linear import full_precision_linear
from neurogen.brain.health import SATURATED_SHARE
from neurogen.brain.regions import MemoryLayer
from neurogen.errors import UserError
from neurogen.model import NeuroGen

QUANTILES = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Activity:
    """Measured over T tokens of one lane.

    Arguments:
        spikes: per cortex layer `[T, D]`, on the CPU.
        firing_rate, silent, saturated: per cortex layer, shares in [0, 1] as in `neurogen.brain.health`.
        go_rate: per Broca column `[K]`, mean gate; empty without basal ganglia.
        half_lives: per memory layer `[H]`, tokens: median over time of the half-life each head's forgetting has.
        entropy: after the thalamus and each layer, mean entropy in nats of the softmax the decoder would give there.
            Its last entry is the model's own; ln(V) is no knowledge at all.
        workspace: after the thalamus and each layer `[T, D]`, on the CPU.
        loss: mean cross-entropy in nats of the next token.
    """

    spikes: dict[str, Tensor]
    firing_rate: dict[str, float]
    silent: dict[str, float]
    saturated: dict[str, float]
    go_rate: Tensor
    half_lives: dict[str, Tensor]
    entropy: dict[str, float]
    workspace: dict[str, Tensor]
    loss: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; half-lives and gates by their smallest, median and largest."""
        return {
            "firing_rate": self.firing_rate,
            "silent": self.silent,
            "saturated": self.saturated,
            "go_rate": quantiles(self.go_rate) if len(self.go_rate) else None,
            "half_lives": {name: quantiles(lives) for name, lives in self.half_lives.items()},
            "entropy": self.entropy,
            "loss": self.loss,
        }


def quantiles(x: Tensor) -> list[float]:
    """Smallest, median and largest."""
    return torch.quantile(x.double(), torch.tensor(QUANTILES, dtype=torch.float64)).tolist()


@torch.no_grad()
def measure_activity(model: NeuroGen, input_ids: Tensor) -> Activity:
    """Read ids `[T]`, T >= 2, one by one from a new state and watch.

    Raises:
        UserError: there are fewer than two ids.
    """
    num_tokens = input_ids.shape[0]
    if num_tokens < 2:
        raise UserError(f"the text has {num_tokens} tokens; activity needs at least 2")
    ids = input_ids.to(model.device)[None]
    state = model.init_state(1)
    spikes: dict[str, list[Tensor]] = {}
    gates: list[Tensor] = []
    hidden: dict[str, list[Tensor]] = {}
    forgotten: dict[str, list[Tensor]] = {}
    with _watching(model, hidden, forgotten):
        for t in range(num_tokens):
            out = model.brain(ids[:, t : t + 1], model.embedding, state)
            state = out.state
            for name, layer in state.layers.items():
                if isinstance(layer, CortexState):
                    spikes.setdefault(name, []).append(layer.spikes[0])
            if out.go is not None:
                gates.append(out.go[0, 0])
    fired = {name: torch.stack(rows).float().cpu() for name, rows in spikes.items()}
    ceiling = CEILINGS[model.config.spike]
    full = {name: (x.abs() >= ceiling).float().mean(0) for name, x in fired.items()}
    workspace = {name: torch.cat(rows, dim=1) for name, rows in hidden.items()}
    logits = model.decoder(workspace[list(workspace)[-1]])
    return Activity(
        spikes=fired,
        firing_rate={name: float((x > 0).float().mean()) for name, x in fired.items()},
        silent={name: float((x.amax(0) <= 0).float().mean()) for name, x in fired.items()},
        saturated={name: float((share >= SATURATED_SHARE).float().mean()) for name, share in full.items()},
        go_rate=torch.stack(gates).float().mean(0).cpu() if gates else torch.empty(0),
        half_lives={name: _half_lives(torch.cat(rows)) for name, rows in forgotten.items()},
        entropy={name: _entropy(model.decoder(x)) for name, x in workspace.items()},
        workspace={name: x[0].float().cpu() for name, x in workspace.items()},
        loss=float(nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])),
    )


def _half_lives(logits: Tensor) -> Tensor:
    """Forget logits `[T, H]` to tokens `[H]`: ln(1/2) / ln(sigmoid(logit)), the median over time."""
    lives = math.log(0.5) / nn.functional.logsigmoid(logits.double())
    return lives.median(0).values.cpu()


def _entropy(logits: Tensor) -> float:
    log_probs = logits.float().log_softmax(-1)
    return float(-(log_probs.exp() * log_probs).sum(-1).mean())


@contextmanager
def _watching(model: NeuroGen, hidden: dict[str, list[Tensor]], forgotten: dict[str, list[Tensor]]) -> Iterator[None]:
    """Collect the workspace after every layer, `[1, 1, D]` a token, and every memory's forget logits, `[1, H]`."""
    handles = []

    def watch(name: str, module: nn.Module, workspace: Callable[[Any], Tensor]) -> None:
        def keep(_module: nn.Module, _inputs: Any, out: Any) -> None:
            hidden.setdefault(name, []).append(workspace(out))

        handles.append(module.register_forward_hook(keep))

    def watch_forgetting(name: str, layer: MemoryLayer) -> None:
        def keep(_module: nn.Module, inputs: Any, _out: Any) -> None:
            logits = full_precision_linear(inputs[1], layer.forget.weight, layer.forget.bias)
            forgotten.setdefault(name, []).append(logits[0])

        handles.append(layer.register_forward_hook(keep))

    watch("thalamus", model.brain.thalamus, lambda out: out[0])
    for name, layer in model.brain.layers().items():
        watch(name, layer, lambda out: out[0] + out[1])  # a layer leaves its MLP's part to be added
        if isinstance(layer, MemoryLayer):
            watch_forgetting(name, layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
