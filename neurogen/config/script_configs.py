"""What scripts/evaluate.py and scripts/generate.py take: conf/evaluate.yaml and conf/generate.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from neurogen.config.checks import DTYPES, check_mode, in_range, one_of
from neurogen.config.schema import ModeConfig
from neurogen.data import DataConfig
from neurogen.errors import UserError


@dataclass
class EvaluateConfig:
    """Which checkpoint to evaluate, on what text and how.

    checkpoint: a run directory (its newest checkpoint) or one checkpoint.
    data: whose validation part is read; None is the data the checkpoint was trained with.
    max_tokens: targets at most, None for all.
    """

    checkpoint: str
    mode: ModeConfig
    data: DataConfig | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_mode(self.mode)
        one_of("dtype", self.dtype, DTYPES)
        if self.max_tokens is not None:
            in_range("max_tokens", self.max_tokens, least=1)


@dataclass
class GenerateConfig:
    """Which checkpoint continues which prompt, and how tokens are drawn (ranges are those of
    kernels.sample.Sampling)."""

    checkpoint: str
    mode: ModeConfig
    prompt: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    format: str = "text"
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check_mode(self.mode)
        one_of("dtype", self.dtype, DTYPES)
        one_of("format", self.format, ("text", "json"))
        in_range("max_new_tokens", self.max_new_tokens, least=1)
        in_range("temperature", self.temperature, least=0)
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must be 0 or more")


@dataclass
class ReplayConfig:
    """Which step to run again (see neurogen.training.replay), and on what."""

    bundle: str
    mode: ModeConfig
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check_mode(self.mode)
        one_of("dtype", self.dtype, DTYPES)
