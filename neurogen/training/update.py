"""One optimiser step: micro-batches in, parameters moved, numbers left on the device.

B lanes, T tokens; the lanes of a batch may be taken in several parts whose gradients are accumulated.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kernels.addresses import AddressTable
from kernels.linear import HOLDS_HALF_GRADIENTS, weight_gradients_beside
from neurogen.brain import BrainState
from neurogen.data import Batch
from neurogen.data.batches import IGNORE
from neurogen.learning import BPTT, LearningRule
from neurogen.probes import stage
from neurogen.training.adamw import FusedAdamW
from neurogen.training.distributed import SINGLE, World, whole
from neurogen.training.exchange import sum_gradients
from neurogen.training.guard import Guard
from neurogen.training.optimizer import ModelOptimizer
from neurogen.training.precision import Precision

if TYPE_CHECKING:
    from neurogen.models import LanguageModel


# From a part's index and its state at the end to the state that the step leaves.
Leave = Callable[[int, BrainState], BrainState]


@dataclass(frozen=True)
class StepResult:
    """What a step measured. Tensors are 0-d and on the device: reading one is a synchronisation, and the caller's
    decision.

    Arguments:
        loss: mean cross-entropy in nats over the step's targets, before the update.
        num_correct: targets that the arg-max hit.
        num_targets: targets that count, known to the host.
        grad_norm: global norm before clipping.
        skipped: 1 if the guard refused the step and nothing was updated, else 0.
        health: the model's health metrics, mean over the parts.
        states: the brain's state after each part, detached.

    With several processes everything but the states is of all of them together, and the same on each.
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
        guard: judges which steps are skipped; None: those that are not finite.
        world: the processes that take each step together.
        spread: the model as `world.spread` returned it.
        learning: how gradients are made; back-propagation through the window if None.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: ModelOptimizer,
        *,
        clip_norm: float,
        precision: Precision,
        guard: Guard | None = None,
        world: World = SINGLE,
        spread: nn.Module | None = None,
        learning: LearningRule | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.precision = precision
        self.guard = guard or Guard(precision.device)
        self.world = world
        self._spread = spread or model
        self.learning: LearningRule = learning or BPTT()
        self._params = [param for param in model.parameters() if param.requires_grad]
        # Whose gradients are back-propagated, and read by nobody before that has ended: FSDP exchanges them meanwhile.
        self._unread = self._params if isinstance(self.learning, BPTT) and not world.shards else []
        reads_half = HOLDS_HALF_GRADIENTS and all(isinstance(each, FusedAdamW) for each in optimizer.optimizers)
        # Gradients are added up over processes, as over parts of a batch, which takes float32. Half precision would be
        # half the traffic between them, but rounded once more for each process.
        reads_half = reads_half and world.size == 1
        is_half = precision.activations.itemsize == 2
        self._half_gradients = precision.activations if is_half and reads_half else None
        self._norm_table: AddressTable | None = None

    def __call__(
        self, batches: Sequence[Batch], states: Sequence[BrainState | None], *, leave: Leave | None = None
    ) -> StepResult:
        """Take one step on `batches`, each read from its own state (None: a new one).

        Parts are weighted by their number of targets, so the gradient is that of the mean over all targets, however
        the lanes were divided. A step that the guard refuses changes no parameter and no moment; non-finite entries of
        the state it leaves start again from zero, which is up to `leave` if it is given. Nothing waits for the device.
        """
        self.optimizer.zero_grad()
        result, factor = self.judged(batches, states, leave=leave)
        with stage("learn"):
            self.optimizer.step(skip=result.skipped, grad_factor=factor)
        return result

    def judged(
        self, batches: Sequence[Batch], states: Sequence[BrainState | None], *, leave: Leave | None = None
    ) -> tuple[StepResult, Tensor]:
        """Everything of a step but the update, and what its gradients are to be multiplied by, 0-d."""
        result = self.backward(batches, states, leave=leave)
        with stage("learn"):
            skipped, factor = self.guard.judge(result.loss, result.grad_norm, clip_norm=self.clip_norm)
        return dataclasses.replace(result, skipped=skipped), factor

    def backward(
        self, batches: Sequence[Batch], states: Sequence[BrainState | None], *, leave: Leave | None = None
    ) -> StepResult:
        """Everything of a step but the update: gradients are left, not clipped yet, in the parameters, and `skipped`
        says nothing yet."""
        counts = [count_targets(batch) for batch in batches]
        num_targets = self.world.sum_count(sum(counts))
        losses, correct, ends, healths = [], [], [], []
        for index, (batch, state, count) in enumerate(zip(batches, states, counts)):
            part = _to_device(batch, self.precision.device)
            # Without targets there is nothing to learn; but FSDP's backward pass waits for every rank's.
            share = count / max(1, num_targets) if count or self.world.shards else None
            # FSDP averages gradients over ranks.
            scaled = share * self.world.size if share is not None and self.world.shards else share
            self.world.begin_part(self._spread, last=index == len(batches) - 1)
            # Parts' gradients are added up, which takes float32.
            half = self._half_gradients if len(batches) == 1 else None
            with weight_gradients_beside(self._unread, half=half):
                out = self.learning.learn(self._spread, part, state, share=scaled, autocast=self.precision.autocast)
            if share is not None:
                losses.append(out.loss if share == 1.0 else out.loss * share)
            correct.append(out.num_correct)
            ends.append((leave or _finite)(index, out.state))
            healths.append(out.health)
        if self.world.size > 1 and not self.world.shards:
            with stage("learn"):
                sum_gradients(self._params)
        loss = _sum(losses) if losses else torch.zeros((), device=self.precision.device)
        grad_norm = self._grad_norm()
        health, num_correct = _mean(healths), _sum(correct)
        if self.world.size > 1:
            numbers = [loss, num_correct, *(value / self.world.size for value in health.values())]
            loss, num_correct, *shares = self.world.sum(torch.stack([number.double() for number in numbers])).unbind()
            health = dict(zip(health, shares))
        return StepResult(loss, num_correct, num_targets, grad_norm, torch.zeros(()), health, ends)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the recording of a step as a CUDA graph, which at least one plain step has preceded."""
        if self._norm_table is not None:
            self._norm_table.prepare_recording()
        with self.optimizer.recording():
            yield
        if self._norm_table is not None:
            self._norm_table.finish_recording()

    def _grad_norm(self) -> Tensor:
        """The global norm of all gradients."""
        grads = [param.grad for param in self._params if param.grad is not None]
        if len(grads) == len(self._params) and all(_is_plain(grad) for grad in grads):
            from kernels.verdict.fused import gradient_norm_fused, make_norm_table

            if self._norm_table is None:
                self._norm_table = make_norm_table(grads)
            return gradient_norm_fused(self._norm_table, grads)
        grad_norm = whole(nn.utils.get_total_norm(grads, error_if_nonfinite=False))
        return grad_norm.to(self.precision.device)


def _is_plain(grad: Tensor) -> bool:
    """Whether `kernels.verdict.fused` can read it."""
    is_whole = grad.is_cuda and type(grad) is Tensor
    readable = grad.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return is_whole and readable and grad.is_contiguous() and grad.data_ptr() % 16 == 0


def _sum(numbers: list[Tensor]) -> Tensor:
    return numbers[0] if len(numbers) == 1 else torch.stack(numbers).sum()


def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each metric over the parts."""
    if len(parts) == 1:
        return parts[0]
    rows = torch.stack([torch.stack([value.float() for value in part.values()]) for part in parts])
    return dict(zip(parts[0], rows.mean(0).unbind()))


def split_batch(batch: Batch, num_parts: int) -> list[Batch]:
    """The lanes of a batch in equal parts."""
    lanes = batch.input_ids.shape[0]
    assert lanes % num_parts == 0, "the config check divides the lanes evenly"
    tensors = (batch.input_ids, batch.target_ids, batch.document_start)
    counts = np.array_split(_counts(batch), num_parts)
    parts = zip(*(tensor.chunk(num_parts) for tensor in tensors), counts)
    return [Batch(ids, targets, starts, count) for ids, targets, starts, count in parts]


def _counts(batch: Batch) -> np.ndarray:
    """Targets that count in each lane; read from the tensor only where the data did not count them on the host."""
    if batch.num_targets is not None:
        return batch.num_targets
    return (batch.target_ids != IGNORE).sum(1).cpu().numpy()


def count_targets(batch: Batch) -> int:
    """How many targets of a batch count."""
    return int(_counts(batch).sum())


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type != "cuda" or batch.input_ids.device.type == "cuda":
        return batch.to(device)
    # Copies from pageable memory would make the host wait.
    pinned = Batch(batch.input_ids.pin_memory(), batch.target_ids.pin_memory(), batch.document_start.pin_memory())
    return pinned.to(device, non_blocking=True)


def _finite(index: int, state: BrainState) -> BrainState:
    """One overflow must not follow a lane through the rest of the run: a state begins at zero, so zero it is again."""
    return state.map(lambda x: x.nan_to_num(0.0, 0.0, 0.0) if x.is_floating_point() else x)
