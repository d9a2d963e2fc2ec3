"""What scripts/evaluate.py and scripts/generate.py take: conf/evaluate.yaml and conf/generate.yaml."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

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
    contexts: tokens after which the carried state is replaced by a new one, for a figure of each; multiples of the
        window.
    weights: `int8` or `fp8` to evaluate once more with matrices rounded to 8 bits; None is without.
    """

    checkpoint: str
    mode: ModeConfig
    data: DataConfig | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_tokens: int | None = None
    contexts: list[int] = field(default_factory=list)
    weights: str | None = None

    def __post_init__(self) -> None:
        check_mode(self.mode)
        one_of("dtype", self.dtype, DTYPES)
        if self.max_tokens is not None:
            in_range("max_tokens", self.max_tokens, least=1)
        if self.weights is not None:
            one_of("weights", self.weights, ("int8", "fp8"))
        for context in self.contexts:
            in_range("contexts", context, least=1)


@dataclass
class GenerateConfig:
    """Which checkpoint continues which prompt, and how tokens are drawn (ranges are those of
    kernels.sample.Sampling).

    prompt_file: holds the prompt, in UTF-8; `-` is the standard input, None leaves `prompt` as it is.
    num_samples: replies to the prompt, side by side.
    stop: strings that end a reply and are not shown.
    format: `text`, or `jsonl` for a JSON object a sample.
    weights: `int8` to draw one reply's tokens from rounded matrices (mode fused); None leaves them as they are.
    """

    checkpoint: str
    mode: ModeConfig
    prompt: str = ""
    prompt_file: str | None = None
    num_samples: int = 1
    stop: list[str] = field(default_factory=list)
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
    weights: str | None = None

    def __post_init__(self) -> None:
        check_mode(self.mode)
        one_of("dtype", self.dtype, DTYPES)
        one_of("format", self.format, ("text", "jsonl"))
        if self.weights is not None:
            one_of("weights", self.weights, ("int8",))
        in_range("num_samples", self.num_samples, least=1)
        in_range("max_new_tokens", self.max_new_tokens, least=1)
        in_range("temperature", self.temperature, least=0)
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must be 0 or more")
        if self.prompt and self.prompt_file is not None:
            raise UserError("prompt and prompt_file are both given; leave one out")

    def read_prompt(self) -> str:
        """The prompt's text. Raises UserError, one line, for a file that cannot be read or is no UTF-8."""
        if self.prompt_file is None:
            name, data = "prompt", self.prompt.encode(errors="surrogateescape")
        elif self.prompt_file == "-":
            name, data = "the standard input", sys.stdin.buffer.read()
        else:
            name = f"prompt_file={self.prompt_file}"
            try:
                data = Path(self.prompt_file).read_bytes()
            except OSError as error:
                raise UserError(f"{name}: cannot be read ({error.strerror})") from error
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: is no UTF-8 ({error.reason} at byte {error.start}); convert it") from error


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
