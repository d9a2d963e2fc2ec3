"""The typed shape of every config group: what a YAML file or an override may say.

A group whose choices need different keys (model, optimizer, schedule, learning) has one dataclass per choice, picked by
the group's `name`, so that a key the chosen optimiser would not honour is refused instead of ignored. The dataclasses
of `model`, `data`, `logger` and `learning` live beside the code that uses them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from neurogen.baselines.config import GPTConfig, LSTMConfig
from neurogen.brain.config import BrainConfig
from neurogen.data.config import DataConfig
from neurogen.learning.config import BPTTConfig, LearningConfig, LocalLearningConfig
from neurogen.sweep.config import GridConfig, LocalConfig, OptunaConfig, SlurmConfig
from neurogen.training.loggers import LoggerConfig


@dataclass
class ModeConfig:
    """How a sequence runs: auto, naive, pointer, preallocated, unfused or fused (one model, five ways).

    on_canary_failure: what to do where a fused kernel disagrees with its definition: stop, or fall_back to unfused.
    """

    name: str = "auto"
    on_canary_failure: str = "stop"


@dataclass
class AdamWConfig:
    """AdamW (Loshchilov and Hutter, 2019); weight decay is decoupled and falls on weight matrices only.

    moments: the type both moments are kept in, float32 or, to move and keep fewer bytes on a GPU, bfloat16 (as
    DeepSeek-V3 was trained, arXiv 2412.19437).
    """

    name: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    moments: str = "float32"


@dataclass
class MuonConfig:
    """Muon (Jordan, 2024) for hidden matrices and AdamW for everything else, one learning rate for both.

    Updates of the matrices are scaled to the root mean square AdamW's have (0.2, Liu et al., 2025, arXiv 2502.16982),
    so lr and weight_decay mean the same for both; `lr_rest` sets another rate for what AdamW updates (null: the
    same).
    """

    name: str = "muon"
    lr: float = 2e-3
    lr_rest: float | None = None
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    num_iterations: int = 5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    moments: str = "float32"


@dataclass
class ScheduleConfig:
    """What every schedule has: a linear warm-up that lasts `warmup` (a share of the run) and at least `warmup_steps`.

    `by` names the limit whose share is the run's progress: steps, tokens, seconds, or auto for whichever is closest
    to its end.
    """

    name: str = "constant"
    warmup: float = 0.02
    warmup_steps: int = 0
    by: str = "auto"


@dataclass
class CosineConfig(ScheduleConfig):
    """Half a cosine from 1 down to `final_scale` (a share of the peak rate)."""

    name: str = "cosine"
    final_scale: float = 0.1


@dataclass
class WSDConfig(ScheduleConfig):
    """Warm-up, stable, decay: the rate stays at its peak and falls linearly over the last `decay` (a share of the
    run)."""

    name: str = "wsd"
    decay: float = 0.2
    final_scale: float = 0.0


@dataclass
class ConstantConfig(ScheduleConfig):
    """The peak rate after the warm-up."""


@dataclass
class TrainerConfig:
    """How long to train, in what precision, and how often to look.

    The run ends at the first of max_steps, max_tokens and max_seconds that is reached (at least one is needed).
    Seconds are those of training: not of evaluation, sampling or saving. Intervals are in steps; 0 means never.
    on_save_failure: what a run does where the disk refuses a checkpoint or another of its files: `continue`, counting
    in disk/failures, or `stop`, as after a signal. The checkpoints of before are intact either way.
    """

    max_steps: int | None = None
    max_tokens: int | None = None
    max_seconds: float | None = None
    stop_at_step: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    distributed: str = "none"
    deterministic: bool = False
    cuda_graph: bool | None = None
    overlap_update: bool | None = None
    accumulation: int = 1
    clip_norm: float = 1.0
    outlier_sigma: float | None = 10.0
    max_skipped_in_a_row: int = 20
    dry_run: bool | None = None
    log_every: int = 10
    evaluate_every: int = 200
    evaluate_tokens: int = 262_144
    evaluate_reset: bool = True
    sample_every: int = 500
    sample_tokens: int = 256
    sample_prompts: list[str] = field(default_factory=lambda: [""])
    sample_temperature: float = 0.8
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_best: bool = True
    on_save_failure: str = "continue"
    health_plots: bool = True


@dataclass
class Config:
    """A whole resolved run; every field is checked (see checks.py)."""

    mode: ModeConfig
    model: BrainConfig | GPTConfig | LSTMConfig
    data: DataConfig
    optimizer: AdamWConfig | MuonConfig
    schedule: CosineConfig | WSDConfig | ConstantConfig
    logger: LoggerConfig
    trainer: TrainerConfig
    learning: LearningConfig = field(default_factory=BPTTConfig)
    seed: int = 0
    run_dir: str | None = None
    resume: str | None = None


GROUPS: dict[str, Any] = {
    "mode": ModeConfig,
    "model": {"brain": BrainConfig, "gpt": GPTConfig, "lstm": LSTMConfig},
    "data": DataConfig,
    "optimizer": {"adamw": AdamWConfig, "muon": MuonConfig},
    "schedule": {"cosine": CosineConfig, "wsd": WSDConfig, "constant": ConstantConfig},
    "logger": LoggerConfig,
    "trainer": TrainerConfig,
    "sweep": {"grid": GridConfig, "optuna": OptunaConfig},
    "launcher": {"local": LocalConfig, "slurm": SlurmConfig},
    "learning": {"bptt": BPTTConfig, "local": LocalLearningConfig},
}
# What a configuration without the key means: it was saved before there was a choice.
DEFAULT_NAMES = {"model": "brain"}
