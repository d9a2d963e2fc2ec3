"""A training step recorded as a CUDA graph: the host launches it as one thing, however many kernels it holds.

The update can be put off to the next step, whose forward pass it runs beside: see `neurogen.training.put_off`.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.addresses import AddressTable
from neurogen.brain import BrainState
from neurogen.data import Batch
from neurogen.errors import UserError
from neurogen.learning import BPTT
from neurogen.model import NeuroGen
from neurogen.modes.fused import FusedMode
from neurogen.training.put_off import Overlap, PutOffUpdate, Recording, can_put_off
from neurogen.training.update import StepResult, Update, count_targets

NUM_PLAIN_STEPS = 3  # kernels compile and lazily made buffers settle in them
MOST_OVERLAPPED_TOKENS = 4096  # of a part of a step: with more its forward pass leaves little of the GPU idle
STEPS_AHEAD = 2  # of the device, at most: a limit in seconds must not find minutes of queued work


def can_record(update: Update) -> bool:
    """Whether this step keeps still enough to be recorded: on a GPU, fused kernels, BPTT, parameters not sharded.

    The reference's operations would run recorded as well, but a graph of some 100,000 of them takes longer to make than
    most runs take. A GPT that torch.compile runs compiles anew while it is recorded, which ends the recording. FSDP
    gathers and frees parameters as its own hooks decide.
    """
    model = update.model
    return (
        update.precision.device.type == "cuda"
        and not update.world.shards
        and isinstance(update.learning, BPTT)
        and isinstance(model, NeuroGen)
        and isinstance(model.mode, FusedMode)
    )


def choose_overlap(update: Update, wanted: bool | None, *, num_tokens: int) -> Overlap | None:
    """How a recorded step's update lies beside the next one's forward pass, or None if it does not.

    Arguments:
        wanted: `trainer.overlap_update`; None: where it can be and helps.
        num_tokens: of a part of a step, in this process.

    Raises:
        UserError: it is wanted and cannot be had.
    """
    possible = can_put_off(update)
    if wanted and not possible:
        raise UserError(
            "trainer.overlap_update=true: needs one process, optimizer=adamw with whole float32 parameters and "
            "model.tie_embedding=false; change those, or leave it null"
        )
    helps = num_tokens <= MOST_OVERLAPPED_TOKENS if wanted is None else wanted
    return Overlap() if possible and helps else None


class RecordedUpdate:
    """Takes the steps of an `Update`: the first few as they are, then recorded and replayed.

    A step of another shape, or with targets that do not count (their number is part of the recording), is taken as it
    is, and so is one that begins with a state where the recorded one did not. What a step returns stays valid until the
    next one.

    With several processes a recorded step holds their exchanges, which all of them have to launch in the same way: if
    one takes a step as it is, so do the others. The hosts agree on that before each step; the plain ones, which come
    first, have made what NCCL connects at its first use.

    With `overlap` a replayed step leaves its update to the next one. Parameters and the optimiser's state are those
    after the last step only once `settle` was called, which costs one update; whoever changes them calls it before.

    Arguments:
        update: its learning rates lie on the device.
        overlap: how an update lies beside the forward pass after it, for which `can_put_off` must hold; None: a step
            ends with its update.
    """

    def __init__(self, update: Update, *, overlap: Overlap | None = None) -> None:
        assert overlap is None or can_put_off(update), "this update cannot be put off"
        self.update = update
        self._overlap = overlap
        self._graphs: list[torch.cuda.CUDAGraph] = []  # of a step, one after another
        self._settling: list[torch.cuda.CUDAGraph] = []  # of an update that was put off
        self._put_off: PutOffUpdate | None = None  # holds the tensors that the graphs read and write
        self._is_put_off = False
        self._num_steps = 0
        # Before the stream that `weight_gradients_beside` has for gradients; kernels of a graph keep their priorities.
        self._stream = torch.cuda.Stream(update.precision.device, priority=-1)
        self._parameters = [param for param in update.model.parameters() if param.requires_grad]
        self._versions: list[int] = []
        self._shapes: list[torch.Size] = []
        self._batches: list[Batch] = []
        self._states: list[BrainState] = []  # what the step reads and what it leaves
        self._before: list[BrainState] = []  # what it read
        self._tables: list[AddressTable] = []  # a part's
        self._read: list[BrainState | None] = []
        self._result: StepResult | None = None

    @property
    def states_read(self) -> list[BrainState | None]:
        """The states that the last step began with."""
        return self._read

    def __call__(self, batches: Sequence[Batch], states: Sequence[BrainState | None]) -> StepResult:
        """As `Update.__call__`."""
        known = [state for state in states if state is not None]
        self._num_steps += 1
        if not self.update.world.all_agree(self._is_usual(batches, states)):
            return self._plain(batches, states)
        if not self._graphs:
            try:
                self._record(batches, known)
            except RuntimeError as error:
                cause = str(error.__context__ or error)  # the end of a recording that failed hides why it did
                name = "cuda_graph" if self._overlap is None else "overlap_update"
                raise UserError(
                    f"trainer.{name}: a step could not be recorded ({cause.splitlines()[0]}); set it to false"
                ) from error
        for own, batch in zip(self._batches, batches):
            _copy_batch(own, batch)
        for held, state in zip(self._states, known):
            if held is not state:
                _copy_state(held, state)
        assert self._result is not None
        self._replay(self._graphs)
        self._is_put_off = bool(self._settling)
        self._read = [*self._before] if known else list(states)
        return self._result

    def settle(self) -> None:
        """Make the update that the last step has put off, if it has: launched here, not waited for. To be called before
        parameters or the optimiser's state are read or changed."""
        if not self._is_put_off:
            return
        if self._current_versions() != self._versions:
            raise RuntimeError("parameters were changed while an update of them was put off; call settle() before")
        self._replay(self._settling)
        self._is_put_off = False

    def release(self) -> None:
        """Let go of the recording, once the device is done with it; to be called before `World.close`. The next step
        would be recorded anew."""
        if not self._graphs:
            return
        self.settle()
        torch.cuda.synchronize(self.update.precision.device)
        for graph in (*self._graphs, *self._settling):
            graph.reset()
        self._graphs, self._settling, self._put_off, self._result = [], [], None, None

    def _replay(self, graphs: list[torch.cuda.CUDAGraph]) -> None:
        for graph in graphs:
            graph.replay()
        torch.autograd.graph.increment_version(self._parameters)
        self._versions = self._current_versions()

    def _is_usual(self, batches: Sequence[Batch], states: Sequence[BrainState | None]) -> bool:
        """Whether this process could replay the step, or record it if there is no recording yet."""
        num_known = sum(state is not None for state in states)
        full = all(count_targets(batch) == batch.input_ids.numel() for batch in batches)
        if not full or 0 < num_known < len(states) or self._num_steps <= NUM_PLAIN_STEPS:
            return False
        if not self._graphs:
            return self._overlap is None or all(param.grad is not None for param in self._parameters)
        shapes = [batch.input_ids.shape for batch in batches]
        return shapes == self._shapes and num_known == len(self._states) and self._current_versions() == self._versions

    def _current_versions(self) -> list[int]:
        return [param._version for param in self._parameters]

    def _plain(self, batches: Sequence[Batch], states: Sequence[BrainState | None]) -> StepResult:
        self.settle()
        # On the stream that will be recorded: autograd runs a node's backward pass where its forward pass ran.
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self.update(batches, states)
        current.wait_stream(self._stream)
        self._versions = self._current_versions()
        self._read = list(states)
        return result

    def _record(self, batches: Sequence[Batch], states: Sequence[BrainState]) -> None:
        device = self.update.precision.device
        self._shapes = [batch.input_ids.shape for batch in batches]
        self._batches = [_own_batch(batch, device) for batch in batches]
        self._before, self._states = ([_own_state(state) for state in states] for _ in range(2))
        from kernels.carry.fused import make_table

        self._tables = [make_table(_tensors(state)) for state in states]
        for index, state in enumerate(states):
            self._leave(index, state)  # what compiles does so before the recording
        if self._overlap is not None:
            self._put_off = PutOffUpdate(self.update, self._stream, self._overlap)
            self._put_off.rehearse(self._batches, self._states)
        self.update.optimizer.zero_grad()
        # What is collected meanwhile may free device memory, which ends a recording: another step's graph, for example.
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # the recording has memory of its own
        try:
            result = self._run_recording()
        finally:
            if collects:
                gc.enable()
        self._result = dataclasses.replace(result, states=list(self._states)) if states else result
        self._versions = self._current_versions()

    def _run_recording(self) -> StepResult:
        put_off = self._put_off
        tables: list[AddressTable | PutOffUpdate] = [*self._tables]
        if put_off is not None:
            tables.append(put_off)
        states: Sequence[BrainState | None] = self._states or [None] * len(self._batches)
        leave = self._leave if self._states else None
        for table in tables:
            table.prepare_recording()
        with self.update.recording(), Recording(self._stream) as recording:
            if put_off is None:
                result = self.update(self._batches, states, leave=leave)
            else:
                self.update.optimizer.zero_grad()
                with put_off.beside(recording, self._batches, self._states):
                    result, factor = self.update.judged(self._batches, states, leave=leave)
                put_off.put_off(factor, result.skipped)
        if put_off is not None:
            with Recording(self._stream) as settling:
                put_off.take_all()
            self._settling = settling.graphs
        for table in tables:
            table.finish_recording()
        self._graphs = recording.graphs
        return result

    def _leave(self, index: int, state: BrainState) -> BrainState:
        """Replace a part's state by that at its end, less what is not finite, and keep what it was before."""
        from kernels.carry.fused import carry_fused  # here, because Triton is needed on a GPU alone

        own, before = self._states[index], self._before[index]
        carry_fused(self._tables[index], _tensors(before), _tensors(own), _tensors(state))
        return own


class Pace:
    """Keeps the host at most STEPS_AHEAD steps ahead of the device."""

    def __init__(self, device: torch.device) -> None:
        self._is_needed = device.type == "cuda"
        self._events: collections.deque[torch.cuda.Event] = collections.deque()

    def keep(self) -> None:
        """To be called once a step was launched: waits until the step STEPS_AHEAD before it has ended."""
        if not self._is_needed:
            return
        event = torch.cuda.Event(blocking=True)  # the host sleeps, instead of asking until the device is there
        event.record()
        self._events.append(event)
        if len(self._events) > STEPS_AHEAD:
            self._events.popleft().synchronize()


def _own_batch(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        batch.input_ids.to(device, copy=True),
        batch.target_ids.to(device, copy=True),
        batch.document_start.to(device, copy=True),
        batch.num_targets,
    )


def _copy_batch(own: Batch, batch: Batch) -> None:
    own.input_ids.copy_(batch.input_ids, non_blocking=True)
    own.target_ids.copy_(batch.target_ids, non_blocking=True)
    own.document_start.copy_(batch.document_start, non_blocking=True)


def _own_state(state: BrainState) -> BrainState:
    return state.map(lambda x: x.clone(memory_format=torch.contiguous_format))


def _tensors(state: BrainState) -> list[Tensor]:
    return [tensor.contiguous() for tensor in state.tensors().values()]


def _copy_state(own: BrainState, state: BrainState) -> None:
    theirs = state.tensors()
    for name, tensor in own.tensors().items():
        tensor.copy_(theirs[name])
