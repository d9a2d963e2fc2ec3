"""What scripts/chat.py takes: conf/chat.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from neurogen.config.checks import DTYPES, check_mode, in_range, one_of
from neurogen.config.schema import ModeConfig
from neurogen.errors import UserError


@dataclass
class ChatConfig:
    """Which checkpoint to talk with, how turns are written and how tokens are drawn (ranges are those of
    kernels.sample.Sampling).

    load: a state file to begin from, None for a new conversation.
    template: what the model reads of a message, which stands at {message}.
    stop: strings that end a reply.
    chunk_tokens: tokens of a launch, between two looks at the terminal.
    weights: `int8` to draw tokens from rounded matrices (mode fused); None leaves them as they are.
    """

    checkpoint: str
    mode: ModeConfig
    load: str | None = None
    template: str = "{message}\n"
    stop: list[str] = field(default_factory=lambda: ["\n\n"])
    max_new_tokens: int = 256
    chunk_tokens: int = 8
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    weights: str | None = None

    def __post_init__(self) -> None:
        check_mode(self.mode)
        one_of("dtype", self.dtype, DTYPES)
        if self.weights is not None:
            one_of("weights", self.weights, ("int8",))
        in_range("max_new_tokens", self.max_new_tokens, least=1)
        in_range("chunk_tokens", self.chunk_tokens, least=1)
        in_range("temperature", self.temperature, least=0)
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must be 0 or more")
