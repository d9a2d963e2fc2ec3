"""Which rule makes gradients, and its settings."""

from __future__ import annotations

from dataclasses import dataclass

from neurogen.errors import UserError

FEEDBACKS = ("symmetric", "random", "spatial")


@dataclass
class BPTTConfig:
    """Back-propagation through the window (truncated at its edges)."""

    name: str = "bptt"


@dataclass
class LocalLearningConfig:
    """Eligibility traces times a learning signal, token by token (see docs/LEARNING.md).

    Arguments:
        feedback: how the decoder's error reaches the layers: `symmetric` broadcasts it through the decoder's weight,
            `random` through a fixed random matrix, `spatial` propagates it through the layers above at the same token.
        dopamine: how far a token's surprise (its loss over the predicted one) scales its learning signal, >= 0; 0: not.
        prediction_decay: of the running mean of the loss that is the prediction, a token, in [0, 1).
        time_constants: whether the neurons' decay learns too.
    """

    name: str = "local"
    feedback: str = "symmetric"
    dopamine: float = 0.0
    prediction_decay: float = 0.999
    time_constants: bool = True

    def __post_init__(self) -> None:
        if self.feedback not in FEEDBACKS:
            raise UserError(f"learning.feedback is {self.feedback!r}; choose one of {', '.join(FEEDBACKS)}")
        if not 0 <= self.dopamine < float("inf"):
            raise UserError(f"learning.dopamine is {self.dopamine}; it must be finite and 0 or more")
        if not 0 <= self.prediction_decay < 1:
            raise UserError(f"learning.prediction_decay is {self.prediction_decay}; it must be in [0, 1)")


LearningConfig = BPTTConfig | LocalLearningConfig
