"""What the trainer asks of a way to learn: gradients in `.grad`, from one window."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from neurogen.brain import BrainState
from neurogen.data import Batch
from neurogen.errors import UserError
from neurogen.learning.config import LearningConfig
from neurogen.probes import stage

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class WindowResult:
    """What a window measured, detached.

    Arguments:
        loss: mean cross-entropy in nats over the window's targets, 0-d.
        num_correct: targets the arg-max hit, 0-d int64.
        state: after the last token.
        health: the model's health metrics.
    """

    loss: Tensor
    num_correct: Tensor
    state: BrainState
    health: dict[str, Tensor]


class LearningRule(Protocol):
    """A way to make gradients."""

    def learn(
        self, model: Any, batch: Batch, state: BrainState | None, *, share: float | None, autocast: Autocast
    ) -> WindowResult:
        """Add `share` times the gradient of the window's mean loss to the parameters' `.grad`; nothing if it is None.

        Arguments:
            model: a model as `neurogen.models` builds it.
            batch: on the model's device.
            state: of the batch's lanes; None for new lanes.
            share: the window's part of the step's targets.
            autocast: makes the context a forward pass runs in.
        """
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """What the rule itself carries from step to step."""
        ...

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore `state_tensors()`."""
        ...


class BPTT:
    """Back-propagation through the window, whatever the model."""

    def learn(
        self, model: Any, batch: Batch, state: BrainState | None, *, share: float | None, autocast: Autocast
    ) -> WindowResult:
        with autocast():
            out = model(batch.input_ids, state, document_start=batch.document_start, target_ids=batch.target_ids)
        if share is not None:
            with stage("learn"):
                out.loss.backward(torch.full_like(out.loss, share))
        return WindowResult(out.loss.detach(), out.num_correct, out.state.detach(), out.health)

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Nothing is carried: a run that goes on from a local rule's leaves its prediction behind."""


def make_learning_rule(config: LearningConfig, model: torch.nn.Module, *, seed: int) -> LearningRule:
    """The rule `config` names.

    Arguments:
        model: what will learn, on its device.
        seed: of the fixed random feedback.

    Raises:
        UserError: the rule does not know this kind of model.
    """
    if config.name == "bptt":
        return BPTT()
    from neurogen.learning.local import LocalLearning
    from neurogen.model import NeuroGen

    if not isinstance(model, NeuroGen):
        raise UserError("learning=local is a rule for spiking neurons, which this model has none of; use learning=bptt")
    return LocalLearning(model, config, seed=seed)  # type: ignore[arg-type]
