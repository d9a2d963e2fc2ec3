"""Learning-rate schedules: pure functions of how much of the run is done.

A schedule yields a scale in [0, 1] that multiplies every group's peak rate. Progress is a share in [0, 1] of
whichever limit drives the run (steps, tokens or seconds), so that a run of 50 seconds anneals as completely as one of
50,000 steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neurogen.config.schema import ConstantConfig, CosineConfig, ScheduleConfig, TrainerConfig, WSDConfig


@dataclass
class Progress:
    """What a run has behind it: optimiser steps, target tokens trained on, and seconds spent training."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def run_share(progress: Progress, trainer: TrainerConfig, *, by: str = "auto", step_tokens: int = 0) -> float:
    """The share of the run, in [0, 1], at the middle of the step about to be taken.

    The middle, so that neither the first nor the last step of a run has a rate of exactly zero; seconds have no
    middle to know in advance and count as they stand. `by` picks the limit; auto takes the limit closest to its end.
    """
    done: dict[str, tuple[float, float | None]] = {
        "steps": (progress.step + 0.5, trainer.max_steps),
        "tokens": (progress.tokens + 0.5 * step_tokens, trainer.max_tokens),
        "seconds": (progress.seconds, trainer.max_seconds),
    }
    names = list(done) if by == "auto" else [by]
    shares = [done[name][0] / limit for name in names if (limit := done[name][1]) is not None]
    assert shares, f"no limit to measure progress by ({by}); the config check should have refused this"
    return min(1.0, max(shares))


def learning_rate_scale(schedule: ScheduleConfig, share: float, *, step: int) -> float:
    """The factor on the peak learning rate for step number `step` (from 0) at `share` of the run.

    Warm-up rises linearly until both `warmup` (a share) and `warmup_steps` are behind; what follows depends on the
    schedule:
    cosine: final + (1 - final) (1 + cos(pi q)) / 2 with q the share of the time after the warm-up;
    wsd: 1, then linearly down to final over the last `decay` of the run; constant: 1.
    """
    warm = 1.0
    if schedule.warmup > 0:
        warm = min(warm, share / schedule.warmup)
    if schedule.warmup_steps > 0:
        warm = min(warm, (step + 1) / schedule.warmup_steps)
    return warm * _shape(schedule, share)


def _shape(schedule: ScheduleConfig | CosineConfig | WSDConfig | ConstantConfig, share: float) -> float:
    if schedule.name == "constant":
        return 1.0
    final: float = schedule.final_scale  # type: ignore[union-attr]
    if schedule.name == "cosine":
        after = min(1.0, max(0.0, (share - schedule.warmup) / (1.0 - schedule.warmup)))
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * after))
    assert schedule.name == "wsd", schedule.name
    decay: float = schedule.decay  # type: ignore[union-attr]
    if decay == 0.0 or share <= 1.0 - decay:
        return 1.0
    return 1.0 - (1.0 - final) * min(1.0, (share - (1.0 - decay)) / decay)
