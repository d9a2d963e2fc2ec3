"""A trained model's neural health: what its neurons do, how long they remember, and how far back its gradient reaches.

A run measures it once, at its end, on a little of the validation text; `neurogen.diagnosis.health_plots` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from neurogen.brain.dropout import evaluating
from neurogen.brain.regions import CortexLayer, MemoryLayer
from neurogen.data import Batch, TokenStream
from neurogen.data.batches import expand
from neurogen.diagnosis.activity import Activity, measure_activity, quantiles
from neurogen.diagnosis.horizon import (
    AgeBin,
    context_lengths,
    loss_by_context,
    memory_horizon,
    token_losses,
    workspace_gradient_by_lag,
)
from neurogen.model import NeuroGen

if TYPE_CHECKING:
    from neurogen.models import LanguageModel

# How much is read: windows of training for the horizon, and tokens for what has to go one by one or be kept whole.
HORIZON_WINDOWS, MAX_LANES = 16, 16
MAX_ACTIVITY_TOKENS = 256
MAX_GRADIENT_TOKENS, GRADIENT_LANES, GRADIENT_POSITIONS = 512, 4, 4


@dataclass(frozen=True)
class Health:
    """Measured on validation text. What only a brain has is None or empty for the models it is compared with.

    Arguments:
        context_loss: loss by tokens since reset, see `loss_by_context`.
        horizon: see `memory_horizon`; tokens.
        gradient: by lag, see `gradient_by_lag`.
        activity: of one lane.
        time_constants: of each cortex layer `[D]`, tokens.
        half_lives: of each memory layer `[H]`, tokens, for an input that says nothing about forgetting.
    """

    context_loss: list[AgeBin]
    horizon: int | None
    gradient: Tensor | None
    activity: Activity | None
    time_constants: dict[str, Tensor]
    half_lives: dict[str, Tensor]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; distributions over neurons and heads by their smallest, median and largest."""
        return {
            "context_loss": [asdict(each) | {"error": _finite(each.error)} for each in self.context_loss],
            "horizon": self.horizon,
            "gradient_by_lag": None if self.gradient is None else [_finite(x) for x in self.gradient.tolist()],
            "activity": None if self.activity is None else self.activity.as_dict(),
            "time_constants": {name: quantiles(x) for name, x in self.time_constants.items()},
            "half_lives": {name: quantiles(x) for name, x in self.half_lives.items()},
        }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def measure_health(model: LanguageModel, stream: TokenStream, *, lanes: int, window: int) -> Health:
    """Read a little of a text in lanes that start new, spread over it.

    Arguments:
        lanes, window: those of training. The loss is followed over 16 windows, or over one where the model carries
            nothing from window to window; gradients over one, of at most 512 tokens.
    """
    with evaluating(model), _quick_mode(model):
        return _measure_health(model, stream, lanes=lanes, window=window)


@contextmanager
def _quick_mode(model: LanguageModel) -> Iterator[None]:
    """All modes give the same numbers; inside, a brain runs in one that does not go token by token."""
    if not isinstance(model, NeuroGen) or (model.mode.name == "fused" and model.device.type == "cuda"):
        yield
        return
    mode = model.mode
    model.set_mode("unfused")
    try:
        yield
    finally:
        model.mode = mode


def _measure_health(model: LanguageModel, stream: TokenStream, *, lanes: int, window: int) -> Health:
    carries = bool(model.init_state(1).layers)
    batch = spread_lanes(stream, lanes=min(lanes, MAX_LANES), window=window * (HORIZON_WINDOWS if carries else 1))
    lengths = context_lengths(batch.document_start)
    bins = loss_by_context(token_losses(model, batch), lengths, batch.target_ids >= 0)
    horizon = memory_horizon(bins)
    if not isinstance(model, NeuroGen):
        return Health(bins, horizon, None, None, {}, {})
    short = spread_lanes(stream, lanes=min(lanes, GRADIENT_LANES), window=min(window, MAX_GRADIENT_TOKENS))
    return Health(
        bins,
        horizon,
        workspace_gradient_by_lag(model, short, last_positions(short.input_ids.shape[1])),
        measure_activity(model, batch.input_ids[0, :MAX_ACTIVITY_TOKENS]),
        time_constants(model),
        half_lives(model),
    )


def spread_lanes(stream: TokenStream, *, lanes: int, window: int) -> Batch:
    """Lanes of `window` tokens at equal distances in a text, each with its targets; both shrink to what a short text
    has."""
    num_targets = len(stream) - 1
    window = min(window, num_targets)
    lanes = max(1, min(lanes, num_targets // window))
    starts = [0] if lanes == 1 else [lane * (num_targets - window) // (lanes - 1) for lane in range(lanes)]
    ids = np.stack([stream.tokens[start : start + window + 1] for start in starts]).astype(np.int64)
    resets = np.zeros(ids.shape, dtype=bool)
    if stream.document_start_id is not None:
        resets |= ids == stream.document_start_id
    return expand(torch.from_numpy(ids), torch.from_numpy(resets), stream.document_start_id)


def last_positions(num_tokens: int, count: int = GRADIENT_POSITIONS) -> list[int]:
    """The last token and others at equal distances over the last quarter of a window."""
    step = max(1, num_tokens // (4 * count))
    return sorted({max(0, num_tokens - 1 - i * step) for i in range(count)})


def time_constants(model: NeuroGen) -> dict[str, Tensor]:
    """-1 / ln(alpha) of the neurons of each cortex layer, `[D]` float64 in tokens: how long a voltage lasts."""
    return {
        name: -1.0 / torch.nn.functional.logsigmoid(layer.decay_logit.detach().double()).cpu()
        for name, layer in model.brain.layers().items()
        if isinstance(layer, CortexLayer)
    }


def half_lives(model: NeuroGen) -> dict[str, Tensor]:
    """ln(1/2) / ln(sigmoid(b)) of the heads of each memory layer, `[H]` float64 in tokens, b the bias of forgetting."""
    return {
        name: math.log(0.5) / torch.nn.functional.logsigmoid(layer.forget.bias.detach().double()).cpu()
        for name, layer in model.brain.layers().items()
        if isinstance(layer, MemoryLayer)
    }
