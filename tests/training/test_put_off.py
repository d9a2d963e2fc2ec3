"""An update that is put off, step by step without a GPU: streams are stand-ins, what is launched runs at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import neurogen.training.put_off as put_off_module
from kernels.adamw.fused import make_table
from kernels.launch import INTERPRETED
from neurogen.brain import BrainState
from neurogen.config.schema import MuonConfig
from neurogen.data import Batch
from neurogen.errors import UserError
from neurogen.training.adamw import FusedAdamW
from neurogen.training.optimizer import ModelOptimizer, build_optimizer, rounded_copies
from neurogen.training.precision import Precision
from neurogen.training.put_off import Overlap, PutOffUpdate, can_put_off
from neurogen.training.recorded import MOST_OVERLAPPED_TOKENS, choose_overlap
from neurogen.training.update import Update

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="test_overlapped.py has this on a GPU, recorded")
LANES, WINDOW, VOCAB = 2, 3, 29
SIZES = {"embedding_dim": 32, "column_width": 16, "head_width": 16, "chunk_size": 16}


class StandInStream:
    """Notes who waited for what; the current one is the last entered."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)

    wait_event = wait_stream

    def record_event(self) -> object:
        return object()


class StandInRecording:
    """Notes when the recording was cut."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def cut(self) -> None:
        self.log.append("cut")


@pytest.fixture(autouse=True)
def _streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", StandInStream)
    monkeypatch.setattr(put_off_module, "_FEW_NUMBERS", 1000)  # so that this small model's matrices are not few
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def make_update(make_model: Callable[..., Any], **config: Any) -> Update:
    model = make_model(vocab_size=VOCAB, dtype=torch.float32, mode="fused", **SIZES, **config)
    decayed = [param for param in model.parameters() if param.dim() > 1 and param is not model.embedding.weight]
    kept = [param for param in model.parameters() if all(param is not each for each in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    adamw = FusedAdamW(groups, 0.01, betas=(0.9, 0.95), eps=1e-8, copies=lambda: rounded_copies(model))
    for group in adamw.param_groups:
        group["lr"] = torch.tensor(0.01)
    optimizer = ModelOptimizer(model, [adamw])
    return Update(model, optimizer, clip_norm=0.5, precision=Precision(torch.device("cpu"), "float32"))


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB - 1, (LANES, WINDOW + 1), generator=generator)
    ids[0, 1] = ids[0, 0]
    start = torch.zeros(LANES, WINDOW, dtype=torch.bool)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), start, np.full(LANES, WINDOW))


def set_rate(update: Update, step: int) -> None:
    for group in update.optimizer.optimizers[0].param_groups:
        group["lr"].fill_(0.01 / (1 + step))


def break_gradient(update: Update, step: int) -> Any:
    """A step whose gradient is not finite, for one step of the walk."""
    if step != 2:
        return contextlib.nullcontext()
    bias = next(param for name, param in update.model.named_parameters() if name.endswith("drive_bias"))
    return contextlib.closing(_Hook(bias.register_hook(lambda grad: grad * float("nan"))))


class _Hook:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def close(self) -> None:
        self.handle.remove()


def state_of(update: Update) -> dict[str, torch.Tensor]:
    params = {name: param.detach().clone() for name, param in update.model.named_parameters()}
    return params | {name: tensor.clone() for name, tensor in update.optimizer.state_tensors().items()}


@pytest.mark.parametrize(
    "overlap",
    [
        pytest.param(Overlap(turns=2), id="small parts"),
        pytest.param(Overlap(part=2048, turns=1), id="large parts", marks=pytest.mark.slow),
    ],
)
def test_steps_put_off_end_with_the_bits_of_those_that_are_not(
    make_model: Callable[..., Any], overlap: Overlap
) -> None:
    plain, late = (make_update(make_model) for _ in range(2))
    states: dict[Update, list[BrainState | None]] = {each: [each.model.init_state(LANES)] for each in (plain, late)}
    losses: dict[Update, list[float]] = {plain: [], late: []}
    for each in (plain, late):
        states[each] = list(each([make_batch(0)], states[each]).states)
    put_off = PutOffUpdate(late, torch.cuda.Stream(), overlap)
    put_off.rehearse([make_batch(0)], states[late])
    same_state(late, plain)
    for step in range(1, 5):
        set_rate(plain, step)
        with break_gradient(plain, step):
            result = plain([make_batch(step)], states[plain])
        states[plain] = list(result.states)
        losses[plain].append(float(result.loss))

        set_rate(late, step)
        log: list[str] = []
        recording: Any = StandInRecording(log)
        with break_gradient(late, step), put_off.beside(recording, [make_batch(step)], states[late]):
            late.optimizer.zero_grad()
            result, factor = late.judged([make_batch(step)], states[late])
        put_off.put_off(factor, result.skipped)
        states[late] = list(result.states)
        losses[late].append(float(result.loss))
        assert float(result.skipped) == float(step == 2)
        assert log == ["cut"]
        if step in (3, 4):
            put_off.take_all()
            same_state(late, plain)
    assert losses[late] == losses[plain]


def same_state(one: Update, other: Update) -> None:
    theirs = state_of(other)
    for name, tensor in state_of(one).items():
        assert torch.equal(tensor, theirs[name]), name


def test_every_module_waits_for_its_own_parameters(make_model: Callable[..., Any]) -> None:
    update = make_update(make_model)
    states = list(update([make_batch(0)], [update.model.init_state(LANES)]).states)
    main: Any = torch.cuda.Stream()
    put_off = PutOffUpdate(update, main, Overlap())
    put_off.rehearse([make_batch(0)], states)
    launched: list[torch.Tensor] = []
    launch = put_off._launch

    def note_launch(stage: int) -> None:
        launch(stage)
        for group in put_off._groups:
            firsts = [0]
            for param in group.params:
                firsts.append(firsts[-1] + -(-param.numel() // Overlap().part))
            for place, first, last in group.pieces:
                if place == stage:
                    launched.extend(p for p, at in zip(group.params, firsts) if first <= at < last)
        events.append((put_off._course, len(launched)))

    events: list[Any] = []
    seen: dict[str, int] = {}
    put_off._launch = note_launch  # type: ignore[method-assign]
    names = {id(param): name for name, param in update.model.named_parameters()}

    def look(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            course = put_off._course
            assert course is not None
            reached = [i for i, event in enumerate(course.events.values()) if event in main.waited]
            ready = {names[id(param)] for param in launched[: events[max(reached)][1]]}
            own = {full for full in names.values() if full.startswith(f"brain.{name}.")}
            own -= {full for full in own if ".mlp." in full and not name.endswith("mlp")}
            assert own <= ready, name
            seen[name] = len(ready)

        return hook

    brain = update.model.brain
    modules = {"thalamus": brain.thalamus, "basal_ganglia": brain.basal_ganglia, **brain.layers()}
    modules |= {f"{name}.mlp": layer.mlp for name, layer in brain.layers().items()}
    recording: Any = StandInRecording([])
    with put_off.beside(recording, [make_batch(1)], states):
        for name, module in modules.items():
            module.register_forward_pre_hook(look(name))
        update.optimizer.zero_grad()
        update.judged([make_batch(1)], states)
    assert seen.keys() == modules.keys()
    assert len(launched) == len(names) - 1  # all but the embedding
    assert {names[id(param)] for param in launched[-1:]} == {"decoder.weight"}
    assert len(set(seen.values())) > 6  # they do not all wait for everything


def test_what_can_be_put_off(make_model: Callable[..., Any]) -> None:
    update = make_update(make_model)
    assert can_put_off(update)
    assert choose_overlap(update, None, num_tokens=MOST_OVERLAPPED_TOKENS) == Overlap()
    assert choose_overlap(update, None, num_tokens=MOST_OVERLAPPED_TOKENS + 1) is None
    assert choose_overlap(update, True, num_tokens=MOST_OVERLAPPED_TOKENS + 1) == Overlap()
    assert choose_overlap(update, False, num_tokens=1) is None
    tied = make_update(make_model, tie_embedding=True)
    model = make_model(vocab_size=VOCAB, dtype=torch.float32, mode="fused", **SIZES)
    muon = Update(model, build_optimizer(model, MuonConfig()), clip_norm=1.0, precision=update.precision)
    for other in (tied, muon):
        assert choose_overlap(other, None, num_tokens=1) is None
        with pytest.raises(UserError, match=r"trainer.overlap_update=true: needs one process"):
            choose_overlap(other, True, num_tokens=1)


def test_a_part_is_whole_blocks() -> None:
    with pytest.raises(AssertionError, match="a part is whole blocks"):
        make_table([torch.zeros(3)], part=512)
