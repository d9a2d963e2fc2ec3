"""One optimiser step: micro-batches in, parameters moved, numbers left on the device.

B lanes, T tokens; the lanes of a batch may be taken in several parts whose gradients are accumulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neurogen.brain import BrainState
from neurogen.data import Batch
from neurogen.data.batches import IGNORE
from neurogen.learning import BPTT, LearningRule
from neurogen.training.optimizer import ModelOptimizer
from neurogen.training.precision import Precision

if TYPE_CHECKING:
    from neurogen.models import LanguageModel


@dataclass(frozen=True)
class StepResult:
    """What a step measured. Tensors are 0-d and on the device: reading one is a synchronisation, and the caller's
    decision.

    Arguments:
        loss: mean cross-entropy in nats over the step's targets, before the update.
        num_correct: targets that the arg-max hit.
        num_targets: targets that count, known to the host.
        grad_norm: global norm before clipping.
        skipped: 1 if the gradient or loss was not finite and nothing was updated, else 0.
        health: the model's health metrics, mean over the parts.
        states: the brain's state after each part, detached.
    """

    loss: Tensor
    num_correct: Tensor
    num_targets: int
    grad_norm: Tensor
    skipped: Tensor
    health: dict[str, Tensor]
    states: list[BrainState]


class Update:
    """Applies steps to a model.

    Arguments:
        model, optimizer: what is moved, and how.
        clip_norm: the global gradient norm is scaled down to this.
        precision: the arithmetic of the forward pass.
        learning: how gradients are made; back-propagation through the window if None.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: ModelOptimizer,
        *,
        clip_norm: float,
        precision: Precision,
        learning: LearningRule | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.precision = precision
        self.learning: LearningRule = learning or BPTT()
        self._params = [param for param in model.parameters() if param.requires_grad]

    def __call__(self, batches: Sequence[Batch], states: Sequence[BrainState | None]) -> StepResult:
        """Take one step on `batches`, each read from its own state (None: a new one).

        Parts are weighted by their number of targets, so the gradient is that of the mean over all targets, however
        the lanes were divided. A step whose loss or gradient is not finite changes no parameter and no moment;
        non-finite entries of the state it leaves start again from zero. Nothing waits for the device.
        """
        self.optimizer.zero_grad()
        result = self.backward(batches, states)
        self.optimizer.step(skip=result.skipped)
        return result

    def backward(self, batches: Sequence[Batch], states: Sequence[BrainState | None]) -> StepResult:
        """Everything of a step but the update: gradients are left, clipped, in the parameters."""
        counts = [int((batch.target_ids != IGNORE).sum()) for batch in batches]
        total = max(1, sum(counts))
        losses, correct, ends, healths = [], [], [], []
        for batch, state, count in zip(batches, states, counts):
            part = _to_device(batch, self.precision.device)
            share = count / total
            out = self.learning.learn(self.model, part, state, share=share, autocast=self.precision.autocast)
            if count:
                losses.append(out.loss * share)
            correct.append(out.num_correct)
            ends.append(_finite(out.state))
            healths.append(out.health)
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=self.precision.device)
        grad_norm = nn.utils.clip_grad_norm_(self._params, self.clip_norm, error_if_nonfinite=False)
        skipped = (~(torch.isfinite(grad_norm) & torch.isfinite(loss))).to(torch.float32)
        health = {name: torch.stack([each[name].float() for each in healths]).mean() for name in healths[0]}
        return StepResult(loss, torch.stack(correct).sum(), sum(counts), grad_norm, skipped, health, ends)


def split_batch(batch: Batch, num_parts: int) -> list[Batch]:
    """The lanes of a batch in equal parts."""
    lanes = batch.input_ids.shape[0]
    assert lanes % num_parts == 0, "the config check divides the lanes evenly"
    parts = zip(*(tensor.chunk(num_parts) for tensor in (batch.input_ids, batch.target_ids, batch.document_start)))
    return [Batch(*part) for part in parts]


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type != "cuda":
        return batch.to(device)
    # Copies from pageable memory would make the host wait.
    pinned = Batch(batch.input_ids.pin_memory(), batch.target_ids.pin_memory(), batch.document_start.pin_memory())
    return pinned.to(device, non_blocking=True)


def _finite(state: BrainState) -> BrainState:
    """One overflow must not follow a lane through the rest of the run: a state begins at zero, so zero it is again."""
    return state.map(lambda x: x.nan_to_num(0.0, 0.0, 0.0) if x.is_floating_point() else x)
