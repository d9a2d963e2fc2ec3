"""What types cannot say: ranges, and which settings cannot go together. Every failure is one line that names the
key."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from neurogen.errors import UserError

if TYPE_CHECKING:
    from neurogen.config.schema import Config, ModeConfig

MODES = ("auto", "naive", "pointer", "preallocated", "unfused", "fused")
DTYPES = ("auto", "float32", "bfloat16", "float64")
ON_CANARY_FAILURE = ("stop", "fall_back")
LOGGERS = ("wandb", "none")
LOGGER_MODES = ("offline", "online")
STRATEGIES = ("none", "ddp", "fsdp")
ON_SAVE_FAILURE = ("stop", "continue")
MOMENTS = ("float32", "bfloat16")
# The largest beta that bfloat16 moments are used with: a step moves a moment by (1 - beta) of its distance from what it
# averages, and is lost below 2^-9 of the moment, which at 0.99 is a distance of a fifth.
MAX_HALF_BETA = 0.99
PROGRESS_BY = ("auto", "steps", "tokens", "seconds")


def check_config(config: Config) -> None:
    """Raise UserError for the first setting that is out of range or contradicts another."""
    check_mode(config.mode)
    one_of("logger.name", config.logger.name, LOGGERS)
    one_of("logger.mode", config.logger.mode, LOGGER_MODES)
    _check_trainer(config)
    _check_optimizer(config)
    _check_schedule(config)
    lanes, accumulation = config.data.lanes, config.trainer.accumulation
    if lanes % accumulation:
        raise UserError(
            f"trainer.accumulation={accumulation}: must divide data.lanes={lanes}, which it takes in that many parts"
        )
    if config.seed < 0:
        raise UserError(f"seed={config.seed}: must be 0 or more")


def check_mode(mode: ModeConfig) -> None:
    """Raise UserError for a mode or a canary policy that does not exist."""
    one_of("mode.name", mode.name, MODES)
    one_of("mode.on_canary_failure", mode.on_canary_failure, ON_CANARY_FAILURE)


def _check_trainer(config: Config) -> None:
    trainer = config.trainer
    one_of("trainer.dtype", trainer.dtype, DTYPES)
    one_of("trainer.distributed", trainer.distributed, STRATEGIES)
    one_of("trainer.on_save_failure", trainer.on_save_failure, ON_SAVE_FAILURE)
    limits = ("max_steps", "max_tokens", "max_seconds")
    for key in limits:
        if (value := getattr(trainer, key)) is not None:
            in_range(f"trainer.{key}", value, above=0)
    if all(getattr(trainer, key) is None for key in limits):
        raise UserError(
            "trainer.max_steps: a run needs an end; set trainer.max_steps, trainer.max_tokens or trainer.max_seconds"
        )
    if trainer.stop_at_step is not None:
        in_range("trainer.stop_at_step", trainer.stop_at_step, least=1)
    for key in ("accumulation", "log_every", "evaluate_tokens", "sample_tokens", "keep_last"):
        in_range(f"trainer.{key}", getattr(trainer, key), least=1)
    for key in ("evaluate_every", "sample_every", "checkpoint_every", "sample_temperature"):
        in_range(f"trainer.{key}", getattr(trainer, key), least=0)
    in_range("trainer.clip_norm", trainer.clip_norm, above=0)
    in_range("trainer.max_skipped_in_a_row", trainer.max_skipped_in_a_row, least=0)
    if trainer.outlier_sigma is not None:
        in_range("trainer.outlier_sigma", trainer.outlier_sigma, above=0)


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    in_range("optimizer.lr", optimizer.lr, above=0)
    in_range("optimizer.eps", optimizer.eps, above=0)
    in_range("optimizer.weight_decay", optimizer.weight_decay, least=0)
    for key in ("beta1", "beta2", "momentum"):
        if hasattr(optimizer, key):
            in_range(f"optimizer.{key}", getattr(optimizer, key), least=0, below=1)
    one_of("optimizer.moments", optimizer.moments, MOMENTS)
    largest = max(optimizer.beta1, optimizer.beta2)
    if optimizer.moments != "float32" and largest > MAX_HALF_BETA:
        raise UserError(
            f"optimizer.moments={optimizer.moments}: its rounding would swallow the steps of an average with a beta of "
            f"{largest}; use betas of at most {MAX_HALF_BETA}, or float32"
        )
    if hasattr(optimizer, "num_iterations"):
        in_range("optimizer.num_iterations", optimizer.num_iterations, least=1)
    if getattr(optimizer, "lr_rest", None) is not None:
        in_range("optimizer.lr_rest", optimizer.lr_rest, above=0)  # type: ignore[union-attr]


def _check_schedule(config: Config) -> None:
    schedule, trainer = config.schedule, config.trainer
    one_of("schedule.by", schedule.by, PROGRESS_BY)
    if schedule.by != "auto" and getattr(trainer, f"max_{schedule.by}") is None:
        raise UserError(f"schedule.by={schedule.by}: needs trainer.max_{schedule.by}, which is not set")
    in_range("schedule.warmup", schedule.warmup, least=0, below=1)
    in_range("schedule.warmup_steps", schedule.warmup_steps, least=0)
    if hasattr(schedule, "final_scale"):
        in_range("schedule.final_scale", schedule.final_scale, least=0, most=1)
    decay = getattr(schedule, "decay", 0.0)
    in_range("schedule.decay", decay, least=0, most=1)
    if schedule.warmup + decay > 1:
        raise UserError(
            f"schedule.decay={decay}: with schedule.warmup={schedule.warmup} it is more than the whole run (1)"
        )


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{key}={value}: unknown; choose one of {', '.join(choices)}")


def in_range(
    key: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise UserError unless `value` is finite and inside the bounds given."""
    bounds = [
        (least is None or value >= least, f"at least {least}"),
        (above is None or value > above, f"more than {above}"),
        (most is None or value <= most, f"at most {most}"),
        (below is None or value < below, f"less than {below}"),
    ]
    if not math.isfinite(value):
        raise UserError(f"{key}={value}: must be a finite number")
    for holds, bound in bounds:
        if not holds:
            raise UserError(f"{key}={value}: must be {bound}")
