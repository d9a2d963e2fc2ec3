"""AdamW's step put off: what a recorded step has decided is done beside the forward pass of the next one.

The forward pass of a few lanes is a chain of small launches that leave most of the GPU idle, and AdamW is large ones
that wait for memory. So a recording begins with the update that the step before has left, on a second stream; each
layer waits until its parameters are there, the decoder for the rest. It ends with gradients and a verdict, and keeps on
the device what the update will need: the learning rate of its own step, the clipping factor, whether it is skipped.

Gradients are read while the next forward pass runs, so they may not lie in memory that this pass uses for something
that comes and goes. Forward pass and backward pass are therefore two recordings with memory of their own. The cut is
before the decoder, which makes gradients already.

The embedding's rows are needed at once, but few of them: `kernels.adamw.rows` updates those before the first layer, and
the others in turn beside the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels.addresses import AddressTable
from neurogen.brain import BrainState
from neurogen.data import Batch
from neurogen.model import NeuroGen
from neurogen.probes import listening
from neurogen.training.adamw import FusedAdamW, aligned

if TYPE_CHECKING:
    from kernels.adamw.fused import Launch
    from neurogen.training.update import Update

_FEW_NUMBERS = 2**20  # a group of parameters with fewer in all (biases, time constants) is updated by one launch, first


@dataclass(frozen=True)
class Overlap:
    """How an update lies beside a forward pass; the same numbers come out whatever is chosen.

    part: numbers that one program updates, a multiple of 1,024. A product that needs a whole multiprocessor waits for
        the programs there to end.
    turns: steps in which every row of the embedding is updated once.
    """

    part: int = 1024
    turns: int = 16


def can_put_off(update: Update) -> bool:
    """Whether this step's update could be: one process, AdamW alone, on an embedding that only the relay reads."""
    model, optimizers = update.model, update.optimizer.optimizers
    return (
        update.world.size == 1
        and len(optimizers) == 1
        and isinstance(optimizers[0], FusedAdamW)
        and isinstance(model, NeuroGen)
        and not model.config.tie_embedding
        and all(param.requires_grad for param in model.parameters())
    )


class Recording:
    """Records what is launched inside the context on a stream; `cut` ends one graph and begins the next, with memory of
    its own. Streams that were forked have to be joined before a cut."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self._stream = stream
        self._inside: Any = None

    def __enter__(self) -> Recording:
        self._inside = torch.cuda.stream(self._stream)
        self._inside.__enter__()
        self._begin()
        return self

    def cut(self) -> None:
        self.graphs[-1].capture_end()
        self._begin()

    def __exit__(self, *error: object) -> None:
        try:
            self.graphs[-1].capture_end()  # after an error it raises one of its own, of which the first is the context
        finally:
            self._inside.__exit__(*error)

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that read ahead, go on using the device meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        self.graphs.append(graph)


@dataclass
class _Group:
    """A group of the optimiser's, less the embedding: its parameters in the order they are needed in.

    pieces: stage, and first and last block of the table, of each launch.
    rate: the learning rate of the step put off.
    """

    options: dict[str, Any]
    params: list[Tensor]
    table: AddressTable
    pieces: list[tuple[int, int, int]]
    rate: Tensor
    launch: Launch | None = None


@dataclass
class _Course:
    """How far the recording of a step is."""

    recording: Recording
    is_cut: bool = False
    has_turned: bool = False  # rows of the embedding whose turn it is were updated
    events: dict[int, torch.cuda.Event] = field(default_factory=dict)  # by stage


class PutOffUpdate:
    """The update of an `Update`'s model, recorded in two places: its work at the beginning of a step, what decides it
    at the end.

    Arguments:
        update: `can_put_off`, and has taken a step whose gradients are still there.
        stream: steps are recorded on, of a high priority.
        overlap: how.
    """

    def __init__(self, update: Update, stream: torch.cuda.Stream, overlap: Overlap) -> None:
        from kernels.adamw.fused import make_table
        from kernels.adamw.rows import RowSteps

        (optimizer,) = update.optimizer.optimizers
        model = update.model
        assert isinstance(optimizer, FusedAdamW)
        assert isinstance(model, NeuroGen)
        device = update.precision.device
        self._optimizer, self._model = optimizer, model
        self._main, self._side = stream, torch.cuda.Stream(device)
        self._part = overlap.part
        self._stages = _stages(model)
        self._factor, self._skip = torch.ones((), device=device), torch.ones((), device=device)  # nothing is put off
        embedding: Tensor = model.embedding.weight
        self._groups = [
            self._group(options, [param for param in options["params"] if param is not embedding])
            for options in optimizer.param_groups
        ]
        self._rows = RowSteps.new(len(embedding), overlap.turns, device)
        options = next(each for each in optimizer.param_groups if any(param is embedding for param in each["params"]))
        self._embedding = _Group(options, [embedding], make_table([embedding]), [], torch.zeros((), device=device))
        self._tables = [each.table for each in (*self._groups, self._embedding)]
        self._ids = self._ids_before = torch.empty(0, dtype=torch.int64)  # `[N]`, of this step and the one before
        self._course: _Course | None = None
        self._grads = self._current_grads()  # of a plain step: what a launch is to expect

    def _group(self, options: dict[str, Any], params: list[Tensor]) -> _Group:
        from kernels.adamw.fused import count_blocks, make_table

        stage = self._stages
        params = sorted(params, key=lambda param: stage[param])
        at_once = sum(param.numel() for param in params) < _FEW_NUMBERS
        pieces: list[tuple[int, int, int]] = []
        first = 0
        for param in params:
            place, last = 0 if at_once else stage[param], first + count_blocks(param, self._part)
            if pieces and pieces[-1][0] == place:
                pieces[-1] = (place, pieces[-1][1], last)
            else:
                pieces.append((place, first, last))
            first = last
        rate = torch.zeros((), device=params[0].device)
        return _Group(options, params, make_table(params, part=self._part), pieces, rate)

    def rehearse(self, batches: Sequence[Batch], states: Sequence[BrainState]) -> None:
        """Launch everything once, as plain launches that change nothing: what compiles does so before a recording."""
        ids = self._ids = torch.cat(_ids(batches, states))
        self._ids_before = torch.full_like(ids, -1)
        self._describe()
        self._count_steps()
        for stage in self._order():
            self._launch(stage)
        self._catch_up(ids, self._ids_before)
        self._make_up(whole=False)
        self._note(self._factor.clone(), self._skip.clone())
        self.take_all()

    def prepare_recording(self) -> None:
        for table in self._tables:
            table.prepare_recording()

    def finish_recording(self) -> None:
        """To be called once the step was recorded, before it is replayed."""
        for table in self._tables:
            table.finish_recording()
        self._grads = {}

    # In the order of a recording.

    @contextlib.contextmanager
    def beside(self, recording: Recording, batches: Sequence[Batch], states: Sequence[BrainState]) -> Iterator[None]:
        """Around forward and backward pass as they are recorded: begins with the update of the step before."""
        course = self._course = _Course(recording)
        self._describe()
        self._grads = {}
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            self._count_steps()
            for stage in self._order():
                self._launch(stage)
                course.events[stage] = self._side.record_event()
        torch.cat(_ids(batches, states), out=self._ids)
        self._catch_up(self._ids_before, self._ids)
        hooks = [
            module.register_forward_pre_hook(lambda *_, stage=stage: self._wait(stage))
            for module, stage in _modules(self._model, self._stages)
        ]
        try:
            with listening(stages=self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Called as the step comes to one of `neurogen.probes.STAGES`."""
        course = self._course
        assert course is not None
        if name == "decode" and not course.is_cut:
            self._main.wait_stream(self._side)
            course.recording.cut()
            course.is_cut = True
        if name == "learn" and course.is_cut and not course.has_turned:
            course.has_turned = True
            self._side.wait_stream(self._main)
            with torch.cuda.stream(self._side):
                self._ids_before.copy_(self._ids)
                self._make_up(whole=False)
        return contextlib.nullcontext()

    def put_off(self, factor: Tensor, skip: Tensor) -> None:
        """The end of a step: keep its verdict, as `Guard.judge` gives it, and where its gradients are."""
        course = self._course
        assert course is not None
        assert course.has_turned, "a step that is recorded has targets"
        self._main.wait_stream(self._side)
        # What was recorded at the beginning reads these gradients.
        before = [group.launch for group in (*self._groups, self._embedding)]
        self._grads = self._current_grads()
        self._describe()
        for old, group in zip(before, (*self._groups, self._embedding)):
            assert old is not None
            assert group.launch is not None
            assert old[-4:] == group.launch[-4:], "gradients are of the types that a plain step has"
            group.launch = old
        self._note(factor, skip)
        self._course = None

    def take_all(self) -> None:
        """The whole update that is put off, at once, and then none is; may be recorded."""
        self._count_steps()
        for stage in self._order():
            self._launch(stage)
        self._catch_up(self._ids_before, self._ids_before)
        self._make_up(whole=True)
        self._skip.fill_(1.0)

    # What these are made of.

    def _wait(self, stage: int) -> None:
        course = self._course
        if course is not None and not course.is_cut:
            self._main.wait_event(course.events[stage])

    def _order(self) -> list[int]:
        return sorted({piece[0] for group in self._groups for piece in group.pieces} | {*self._stages.values()})

    def _current_grads(self) -> dict[Tensor, Tensor]:
        return {param: aligned(param.grad) for param in self._model.parameters()}

    def _describe(self) -> None:
        copies = self._optimizer.current_copies()
        for group in (*self._groups, self._embedding):
            group.launch = self._optimizer.describe(
                group.table,
                group.options,
                group.params,
                [self._grads[param] for param in group.params],
                copies,
                lr=group.rate,
                grad_factor=self._factor,
                skip=self._skip,
            )

    def _count_steps(self) -> None:
        from kernels.adamw.fused import count_steps

        for group in self._groups:
            count_steps(_launch_of(group))

    def _launch(self, stage: int) -> None:
        """What is needed at a stage."""
        from kernels.adamw.fused import launch_blocks

        for group in self._groups:
            for place, first, last in group.pieces:
                if place == stage:
                    launch_blocks(_launch_of(group), first, last)

    def _catch_up(self, before: Tensor, now: Tensor) -> None:
        from kernels.adamw.rows import catch_up

        catch_up(self._rows, _launch_of(self._embedding), self._model.config.embedding_dim, before, now)

    def _make_up(self, *, whole: bool) -> None:
        from kernels.adamw.rows import make_up

        make_up(self._rows, _launch_of(self._embedding), self._model.config.embedding_dim, whole=whole)

    def _note(self, factor: Tensor, skip: Tensor) -> None:
        from kernels.adamw.rows import note

        (embedding,) = self._embedding.params
        launch = _launch_of(self._embedding)
        rates = [group.options["lr"] for group in self._groups]
        noted = launch._replace(lr=self._embedding.options["lr"], grad_scale=factor, skip=skip)
        note(self._rows, noted, self._optimizer.state[embedding]["step"])
        kept = [self._factor, self._skip, *(group.rate for group in self._groups)]
        torch._foreach_copy_(kept, [factor, skip, *rates])


def _launch_of(group: _Group) -> Launch:
    assert group.launch is not None
    return group.launch


def _ids(batches: Sequence[Batch], states: Sequence[BrainState]) -> list[Tensor]:
    """Of every row of the embedding that a step reads."""
    return [*(batch.input_ids.reshape(-1) for batch in batches), *(state.recent_ids.reshape(-1) for state in states)]


def _parts(model: NeuroGen) -> dict[str, nn.Module]:
    """Circuits and MLPs by name, in the order that a forward pass calls them in."""
    layers = model.brain.layers().items()
    return {name + end: layer.get_submodule(end[1:]) for name, layer in layers for end in ("", ".mlp")}


def _stages(model: NeuroGen) -> dict[Tensor, int]:
    """When a parameter is needed: 0 by the relay, then by circuits and MLPs, at last by the decoder."""
    places = {part: 1 + i for i, part in enumerate(_parts(model))}
    last = 1 + max(places.values(), default=0)
    if model.brain.basal_ganglia is not None:
        places["basal_ganglia"] = next(place for part, place in places.items() if part.startswith("broca"))
    stages: dict[Tensor, int] = {}
    for name, param in model.named_parameters():
        region, _, rest = name.partition(".")
        owners = [part for part in places if region == "brain" and rest.startswith(part + ".")]
        outside = last if region == "decoder" else 0
        stages[param] = places[max(owners, key=len)] if owners else outside  # an MLP's name is longer than its layer's
    return stages


def _modules(model: NeuroGen, stages: dict[Tensor, int]) -> list[tuple[nn.Module, int]]:
    """Modules that are called in a forward pass, and the stage whose parameters each is the first to need."""
    modules: list[tuple[nn.Module, nn.Module]] = [(model.brain.thalamus, model.brain.thalamus)]
    for name, module in _parts(model).items():
        # A layer's MLP waits for itself.
        modules.append((module, module if name.endswith(".mlp") else module.get_submodule("in_proj")))
    if model.brain.basal_ganglia is not None:
        modules.append((model.brain.basal_ganglia, model.brain.basal_ganglia))
    return [(module, max(stages[param] for param in own.parameters())) for module, own in modules]
