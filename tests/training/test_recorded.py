"""Steps recorded as a CUDA graph against the same steps launched one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neurogen.training.update as update_module
from kernels.linear import beside
from neurogen import BrainConfig, NeuroGen
from neurogen.brain import BrainState
from neurogen.config.compose import compose_config
from neurogen.config.schema import AdamWConfig, MuonConfig
from neurogen.data import Batch
from neurogen.errors import UserError
from neurogen.training.optimizer import build_optimizer
from neurogen.training.precision import Precision
from neurogen.training.recorded import NUM_PLAIN_STEPS, Pace, RecordedUpdate, can_record
from neurogen.training.run import train
from neurogen.training.update import Update

LANES, WINDOW, VOCAB = 3, 19, 257
BRAIN = BrainConfig(embedding_dim=64, column_width=32, head_width=32)
OPTIMIZERS = {"adamw": AdamWConfig(lr=3e-3), "muon": MuonConfig(lr=3e-3)}


def make_batch(step: int, *, window: int = WINDOW, ignored: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (LANES, window + 1), generator=generator)
    targets = ids[:, 1:].clone()
    counts = np.full(LANES, window)
    if ignored:
        targets[0, 0] = -100
        counts[0] -= 1
    start = torch.rand(LANES, window, generator=generator) < 0.05
    return Batch(ids[:, :-1].cuda(), targets.cuda(), start.cuda(), counts)


def make_update(optimizer: str, *, dropout: float = 0.0, mask: str = "token") -> Update:
    torch.manual_seed(0)
    brain = dataclasses.replace(BRAIN, dropout=dropout, dropout_mask=mask)
    model = NeuroGen(brain, vocab_size=VOCAB, mode="fused")
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
    precision = Precision(torch.device("cuda"), "bfloat16")
    precision.place(model)
    return Update(model, build_optimizer(model, OPTIMIZERS[optimizer]), clip_norm=0.5, precision=precision)


def walk(
    optimizer: str, *, recorded: bool, carried: bool = True, num_steps: int = 9, **dropout: Any
) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """Losses, the parameters after the last step, and evaluations on the way; some steps are out of the ordinary."""
    update = make_update(optimizer, **dropout)
    take = RecordedUpdate(update) if recorded else update
    states: list[BrainState | None] = [None]
    losses, evaluations = [], []
    for step in range(num_steps):
        update.optimizer.set_rate_scale(0.5 + 0.05 * step)
        batch = make_batch(step, ignored=step == 5, window=11 if step == 7 else WINDOW)
        result = take([batch], states)
        states = list(result.states) if carried else [None]
        losses.append(float(result.loss))
        if step in (4, 6):
            with torch.no_grad(), update.precision.autocast():
                out = update.model(batch.input_ids, target_ids=batch.target_ids)
            evaluations.append(float(out.loss))
    return losses, {name: param.detach().clone() for name, param in update.model.named_parameters()}, evaluations


@pytest.mark.gpu
@pytest.mark.skipif(not beside.HOLDS_HALF_GRADIENTS, reason="this torch keeps gradients in their weight's type")
def test_gradients_in_half_precision_are_those_in_float32_rounded_once() -> None:
    """Also where they come from several ops, and only where AdamW alone reads them."""
    found = {}
    for half in (True, False):
        update = make_update("adamw")
        if not half:
            update._half_gradients = None
        update.optimizer.zero_grad()
        norm = update.backward([make_batch(0)], [None]).grad_norm
        found[half] = {name: param.grad for name, param in update.model.named_parameters()}, float(norm)
    (stored, norm), (full, exact) = found[True], found[False]
    for name, grad in full.items():
        assert grad.dtype == torch.float32, name
        difference = (stored[name].double() - grad.double()).norm()
        assert float(difference) <= 2**-8 * float(grad.double().norm()), name
    assert norm == pytest.approx(exact, rel=1e-3)
    names = {name for name, grad in stored.items() if grad.dtype == torch.bfloat16}
    assert {"embedding.weight", "decoder.weight"} < names
    assert {name for name in stored if "proj.weight" in name} < names
    assert not any(name.endswith(("bias", "lateral_weight", "taps")) for name in names)

    update = make_update("muon")
    update.backward([make_batch(0)], [None])
    assert all(param.grad.dtype == torch.float32 for param in update.model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("carried", [True, False])
def test_recorded_steps_are_plain_steps_bit_for_bit(optimizer: str, carried: bool) -> None:
    plain, recorded = (walk(optimizer, recorded=recorded, carried=carried) for recorded in (False, True))
    assert recorded[0] == plain[0]
    assert recorded[2] == plain[2]  # evaluation sees the weights of the last replay
    for name, param in plain[1].items():
        assert torch.equal(recorded[1][name], param), name


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["token", "sequence"])
def test_recorded_steps_with_dropout_draw_what_plain_ones_draw(mask: str) -> None:
    """Of a generator that each replay moves on, so that plain steps in between fall in with it."""
    plain, recorded = (walk("adamw", recorded=recorded, dropout=0.3, mask=mask) for recorded in (False, True))
    assert recorded[0] == plain[0]
    assert recorded[2] == plain[2]
    for name, param in plain[1].items():
        assert torch.equal(recorded[1][name], param), name


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["token", "sequence"])
def test_each_replay_draws_anew_and_what_its_generator_says(mask: str) -> None:
    """The same batch, new lanes and weights that stand still: only masks differ."""
    update = make_update("adamw", dropout=0.3, mask=mask)
    take = RecordedUpdate(update)
    update.optimizer.set_rate_scale(0.0)
    losses, generators = [], []
    for _ in range(NUM_PLAIN_STEPS + 4):
        generators.append(torch.cuda.get_rng_state())
        losses.append(float(take([make_batch(0)], [None]).loss))
    assert len(set(losses)) == len(losses)
    torch.cuda.set_rng_state(generators[-2])
    assert [float(take([make_batch(0)], [None]).loss) for _ in range(2)] == losses[-2:]


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [False, True])
def test_gradients_on_a_second_stream_change_no_bit(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: only gradients that are put off can be kept in half precision."""
    put_off = []
    put, together = beside.PutOff.put, update_module.weight_gradients_beside

    def note(self: beside.PutOff, *args: Any) -> None:
        put_off.append(args)
        put(self, *args)

    monkeypatch.setattr(beside.PutOff, "put", note)
    monkeypatch.setattr(update_module, "weight_gradients_beside", lambda weights, half: together(weights))
    got = walk("adamw", recorded=recorded)
    assert put_off
    put_off.clear()
    monkeypatch.setattr(update_module, "weight_gradients_beside", lambda weights, half: contextlib.nullcontext())
    expected = walk("adamw", recorded=recorded)
    assert not put_off
    assert got[0] == expected[0]
    for name, param in expected[1].items():
        assert torch.equal(got[1][name], param), name


@pytest.mark.gpu
def test_weights_changed_from_outside_are_seen() -> None:
    losses: dict[bool, list[float]] = {}
    for recorded in (False, True):
        update = make_update("adamw")
        take = RecordedUpdate(update) if recorded else update
        states: list[BrainState | None] = [None]
        losses[recorded] = []
        for step in range(NUM_PLAIN_STEPS + 5):
            if step == NUM_PLAIN_STEPS + 2:
                with torch.no_grad():
                    update.model.get_parameter("decoder.weight").zero_()
            result = take([make_batch(step)], states)
            states = list(result.states)
            losses[recorded].append(float(result.loss))
    assert losses[True] == losses[False]
    assert losses[True][NUM_PLAIN_STEPS + 2] == pytest.approx(math.log(VOCAB), rel=1e-3)


@pytest.mark.gpu
def test_a_bundle_can_have_the_states_that_a_recorded_step_read() -> None:
    take = RecordedUpdate(make_update("adamw"))
    states: list[BrainState | None] = [None]
    positions = []
    for step in range(NUM_PLAIN_STEPS + 3):
        states = list(take([make_batch(step)], states).states)
        (read,) = take.states_read
        positions.append(0 if read is None else int(read.position[0]))
    assert positions == [step * WINDOW for step in range(NUM_PLAIN_STEPS + 3)]


@pytest.mark.gpu
def test_a_recorded_step_does_not_wait() -> None:
    take = RecordedUpdate(make_update("adamw"))
    states: list[BrainState | None] = [None]
    for step in range(NUM_PLAIN_STEPS + 1):
        states = list(take([make_batch(step)], states).states)
    batch = make_batch(99)
    try:
        torch.cuda.set_sync_debug_mode("error")
        take([batch], states)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_recorded_without_a_gpu() -> None:
    model = NeuroGen(BRAIN, vocab_size=VOCAB, mode="fused")
    update = Update(
        model, build_optimizer(model, AdamWConfig()), clip_norm=1.0, precision=Precision(torch.device("cpu"), "float32")
    )
    assert not can_record(update)
    Pace(torch.device("cpu")).keep()


def test_asking_for_what_cannot_be_recorded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("one two three four " * 60)
    overrides = ["experiment=test", "data=text", "data.path=notes.txt", "trainer.device=cpu", "trainer.cuda_graph=true"]
    with pytest.raises(UserError, match=r"trainer.cuda_graph=true.*mode=fused"):
        train(compose_config([*overrides, "run_dir=a"]))
    overrides[-1] = "trainer.overlap_update=true"
    with pytest.raises(UserError, match=r"trainer.overlap_update=true: only a recorded step"):
        train(compose_config([*overrides, "run_dir=b"]))
