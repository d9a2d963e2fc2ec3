"""Recorded steps whose update runs beside the next step's forward pass, against the same steps taken one by one."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_recorded import LANES, VOCAB, WINDOW, make_batch, make_update

import neurogen.training.put_off as put_off_module
from neurogen import BrainConfig, NeuroGen
from neurogen.brain import BrainState
from neurogen.config.schema import AdamWConfig
from neurogen.data import Batch
from neurogen.training.optimizer import build_optimizer
from neurogen.training.precision import Precision
from neurogen.training.put_off import Overlap
from neurogen.training.recorded import NUM_PLAIN_STEPS, RecordedUpdate
from neurogen.training.update import Update, split_batch

pytestmark = pytest.mark.gpu
OVERLAPS = {"three turns": Overlap(turns=3), "one turn": Overlap(turns=1), "large parts": Overlap(part=8192)}
BROKEN, SHORT, LOOKS, NUM_STEPS = 6, 9, (7, 12), 14


@pytest.fixture(autouse=True)
def _matrices_are_not_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(put_off_module, "_FEW_NUMBERS", 2000)


def walk(
    update: Update, overlap: Overlap | None, *, recorded: bool, carried: bool, num_parts: int = 1
) -> tuple[list[str], list[dict[str, torch.Tensor]]]:
    """Each step's numbers as they print, and everything that a checkpoint would hold on the way and at the end."""
    settling = RecordedUpdate(update, overlap=overlap) if recorded else None
    take = settling or update
    states: list[BrainState | None] = [None] * num_parts
    numbers, saved = [], []
    for step in range(NUM_STEPS):
        update.optimizer.set_rate_scale(0.5 + 0.05 * step)
        if step == BROKEN and carried:
            known = [state for state in states if state is not None]
            states = [s.map(lambda x: x * math.nan if x.is_floating_point() else x) for s in known]
        batch = make_batch(step, window=11 if step == SHORT else WINDOW)
        result = take(split_batch(batch, num_parts), states)
        states = list(result.states) if carried else [None] * num_parts
        numbers.append(f"{float(result.loss)} {float(result.grad_norm)} {int(result.skipped)}")
        if step in LOOKS or step == NUM_STEPS - 1:
            if settling is not None:
                settling.settle()
            tensors = {name: param.detach().clone() for name, param in update.model.named_parameters()}
            tensors |= {name: tensor.clone() for name, tensor in update.optimizer.state_tensors().items()}
            saved.append(tensors)
            with torch.no_grad(), update.precision.autocast():
                numbers.append(str(float(update.model(batch.input_ids, target_ids=batch.target_ids).loss)))
    if settling is not None:
        assert len(settling._graphs) == (1 if overlap is None else 2)
        settling.release()
    return numbers, saved


@pytest.mark.parametrize(
    ("name", "carried", "num_parts"),
    [
        ("three turns", True, 1),
        ("three turns", False, 1),
        ("one turn", True, 3),
        ("large parts", True, 1),
    ],
)
def test_overlapped_steps_are_plain_steps_bit_for_bit(name: str, carried: bool, num_parts: int) -> None:
    """One of them not finite, a short one in between, looked at and gone on from."""
    assert LANES % num_parts == 0
    found = {
        kind: walk(make_update("adamw"), overlap, recorded=kind != "plain", carried=carried, num_parts=num_parts)
        for kind, overlap in (("plain", None), ("recorded", None), ("overlapped", OVERLAPS[name]))
    }
    numbers, saved = found["plain"]
    if carried:
        assert numbers[BROKEN].endswith(" 1")
    for kind in ("recorded", "overlapped"):
        assert found[kind][0] == numbers, kind
        for place, (theirs, expected) in enumerate(zip(found[kind][1], saved, strict=True)):
            different = [key for key, tensor in expected.items() if not torch.equal(theirs[key], tensor)]
            assert not different, (kind, place, different)


def test_moments_in_bfloat16_end_the_same() -> None:
    found = {}
    for overlap in (None, Overlap(turns=4)):
        update = make_update("adamw")
        update.optimizer = build_optimizer(update.model, AdamWConfig(lr=3e-3, beta2=0.95, moments="bfloat16"))
        found[overlap] = walk(update, overlap, recorded=overlap is not None, carried=True)
    (numbers, saved), (theirs, other) = found.values()
    assert theirs == numbers
    for ours, expected in zip(other, saved, strict=True):
        assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())


def test_changing_parameters_before_the_update_is_settled_is_refused() -> None:
    update = make_update("adamw")
    take = RecordedUpdate(update, overlap=Overlap())
    states: list[BrainState | None] = [None]
    for step in range(NUM_PLAIN_STEPS + 3):
        states = list(take([make_batch(step)], states).states)
    take.settle()
    with torch.no_grad():
        update.model.get_parameter("decoder.weight").zero_()
    result = take([make_batch(50)], states)
    assert float(result.loss) == pytest.approx(math.log(VOCAB), rel=1e-3)
    states = list(take([make_batch(51)], list(result.states)).states)
    with torch.no_grad():
        update.model.get_parameter("decoder.weight").zero_()
    with pytest.raises(RuntimeError, match="call settle"):
        take([make_batch(52)], states)


def test_an_overlapped_step_does_not_wait() -> None:
    take = RecordedUpdate(make_update("adamw"), overlap=Overlap())
    states: list[BrainState | None] = [None]
    for step in range(NUM_PLAIN_STEPS + 2):
        states = list(take([make_batch(step)], states).states)
    batch = make_batch(99)
    try:
        torch.cuda.set_sync_debug_mode("error")
        take([batch], states)
        take.settle()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.timeout(400)
def test_a_long_sequence_takes_as_many_launches_as_a_short_one() -> None:
    counts = {}
    for window in (128, 4096):
        torch.manual_seed(0)
        model = NeuroGen(BrainConfig(embedding_dim=64, column_width=32, head_width=32), vocab_size=VOCAB, mode="fused")
        precision = Precision(torch.device("cuda"), "bfloat16")
        precision.place(model)
        update = Update(model, build_optimizer(model, AdamWConfig()), clip_norm=1.0, precision=precision)
        take = RecordedUpdate(update, overlap=Overlap())
        batch = make_batch(0, window=window)
        batch = Batch(
            *(x[:1] for x in (batch.input_ids, batch.target_ids, batch.document_start)), batch.num_targets[:1]
        )
        states: list[BrainState | None] = [None]
        for _ in range(NUM_PLAIN_STEPS + 2):
            states = list(take([dataclasses.replace(batch)], states).states)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            take([batch], states)
            torch.cuda.synchronize()
        events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        counts[window] = sorted(event.name for event in events if "adamw" in event.name or "catch_up" in event.name)
        assert counts[window]
        take.release()
    assert counts[128] == counts[4096]
