"""The generation suite: every way of ours makes the same reply, its figures follow from its time, and it runs."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from neurogen import NeuroGen
from neurogen.baselines import GPT
from neurogen.benchmark import Contender, compare
from neurogen.benchmark import generation as suite
from neurogen.benchmark.bandwidth import read_rate
from neurogen.benchmark.token_steps import SEED, Launched, Replayed, brain_step, compiled

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
(WORK,) = suite.workloads(small=True)


def expected_reply(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    model = suite.make_brain(WORK, CPU, "unfused")
    state = suite.past(WORK, CPU)
    reply = model.generate(suite.first_ids(WORK)[:, None], max_new_tokens=num_tokens, seed=SEED, state=state)
    return reply.tokens, reply.log_probs


TRACING = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own tracer


@TRACING
@pytest.mark.parametrize("how", [Launched, Replayed])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_loop_over_steps_is_the_models_reply(how: type[Launched] | type[Replayed], is_compiled: bool) -> None:
    """A second call makes it again: it begins from the given state, not from where the first ended."""
    step = brain_step(suite.make_brain(WORK, CPU, "unfused"))
    state = suite.past(WORK, CPU).tensors()
    with torch.no_grad():
        run = how(compiled(step, CPU) if is_compiled else step, suite.first_ids(WORK), state, 5)
        replies = [tuple(x.clone() for x in run()) for _ in range(2)]
    tokens, log_probs = expected_reply(5)
    assert len(set(tokens.flatten().tolist())) > 3
    for reply in replies:
        assert torch.equal(reply[0], tokens)
        torch.testing.assert_close(reply[1], log_probs, rtol=0, atol=1e-5)


def test_the_context_was_read_and_lanes_have_it_alike() -> None:
    state = suite.past(WORK, CPU)
    assert state.position.tolist() == [WORK.context] * WORK.lanes
    fast = state.layers["pfc.0"].fast_weight
    assert fast.abs().sum() > 0
    assert torch.equal(fast[0], fast[1])


def test_the_check_sees_wrong_log_probabilities() -> None:
    way = next(way for way in suite.brain_ways(WORK) if way.provider == "neurogen unfused")
    assert way.error(CPU) < 1e-5
    right = way.build(CPU)
    way._built[CPU] = lambda: (right()[0], right()[1] * 1.1)
    assert way.error(CPU) == pytest.approx(0.1, rel=1e-3)


def test_int8_weights_are_one_lanes_and_checked_against_rounded_matrices() -> None:
    work = dataclasses.replace(WORK, lanes=1)
    (way,) = [way for way in suite.brain_ways(work) if way.weights == "int8"]
    plain = next(iter(suite.brain_ways(work)))
    assert way.error(CPU) < 1e-5
    assert dataclasses.replace(way, weights=None).error(CPU) > 1e-4, "rounding must be felt for this to show anything"
    named = suite.make_brain(work, CPU, "unfused").named_parameters()
    matrices = [x for name, x in named if name.endswith(("_proj.weight", "decoder.weight"))]
    saved = sum(3 * matrix.numel() - 4 * matrix.shape[0] for matrix in matrices)
    assert plain.bytes_per_step - way.bytes_per_step == saved
    assert not [way for way in suite.brain_ways(WORK) if way.weights is not None]


def test_figures_are_those_of_the_time() -> None:
    way = next(iter(suite.gpt_ways(WORK)))
    way.build(CPU)
    figures = way.figures(0.5)
    assert figures["us_per_step"] == 0.5e6 / WORK.num_tokens
    assert figures["tokens_per_second"] == WORK.lanes * WORK.num_tokens / 0.5
    assert figures["read_share"] == pytest.approx(way.bytes_per_step * WORK.num_tokens / 0.5 / read_rate(CPU))
    assert 1e8 < figures["read_rate"] < 1e14


def test_bytes_a_step_are_those_of_the_models() -> None:
    model = GPT(WORK.gpt, vocab_size=WORK.vocab_size)
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embedding"))
    cached = 2 * 2 * 32 * WORK.lanes * (WORK.context + WORK.num_tokens // 2)
    assert {way.bytes_per_step for way in suite.gpt_ways(WORK)} == {4 * (weights + cached)}
    brain = suite.make_brain(WORK, CPU, "unfused")
    weights = sum(p.numel() for name, p in brain.named_parameters() if not name.startswith("embedding"))
    state = sum(x.numel() for x in brain.init_state(WORK.lanes).tensors().values() if x.is_floating_point())
    (ours,) = {way.bytes_per_step for way in suite.brain_ways(WORK)}
    assert ours == pytest.approx(4 * (weights + 2 * state), rel=0.01)  # vectors are padded to 64 elements


def test_the_full_grid_and_models_of_equal_size() -> None:
    works = list(suite.workloads(small=False))
    grid = {(work.name, work.context, work.lanes) for work in works}
    full = {(n, c, b) for n in ("base", "small") for c in (128, 1024, 8192, 65536) for b in (1, 4, 16, 64)}
    assert grid == full | {("base long", 128, 1), ("small long", 128, 1)}
    assert len(works) == len(grid)
    with torch.device("meta"):
        for work in (works[0], works[-1]):
            ours = NeuroGen(work.brain, vocab_size=work.vocab_size).num_parameters()
            assert GPT(work.gpt, vocab_size=work.vocab_size).num_parameters() == pytest.approx(ours, rel=0.04)


def test_a_warm_call_follows_an_untimed_one() -> None:
    calls: dict[bool, int] = {}
    for cold in (True, False):
        log: list[int] = []
        contender = Contender("counted", lambda device, log=log: lambda: log.append(1), extra=lambda s: {"own": 1.0})
        (row,) = compare(
            "test", "count", [contender], shape={}, dtype="float32", device=CPU, seconds=0.0, min_rounds=4, cold=cold,
            extra=lambda seconds: {"of the case": 2.0},
        )  # fmt: skip
        assert (row.num_runs, row.extra) == (4, {"own": 1.0})
        calls[cold] = len(log)
    assert calls[False] - calls[True] == 5  # one more for each of four rounds and the first estimate


@pytest.mark.slow
@TRACING
def test_the_suite_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    words = ["suite=generation", "size=test", "device=cpu", "seconds=0", f"output={path}"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(ROOT / "scripts" / "benchmark.py"), run_name="__main__")
    assert not leaving.value.code
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * 7
    assert {row["op"].rpartition(" ")[2] for row in rows} == {"cold", "warm"}
    for row in rows:
        assert row["failure"] is None
        assert row["extra"]["tokens_per_second"] == pytest.approx(4 / row["median"])
        assert (row["error"] is None) == row["provider"].startswith("GPT")
        assert row["error"] is None or row["error"] < 1e-5
    assert "share of it" in path.with_suffix(".md").read_text()


@pytest.mark.gpu
@TRACING
def test_recorded_and_compiled_steps_make_the_reply_on_a_gpu() -> None:
    device = torch.device("cuda")
    ways = list(suite.brain_ways(WORK))
    replies = [way.build(device)() for way in ways]
    for way, reply in zip(ways, replies):
        assert torch.equal(reply[0], replies[1][0]), way.provider
        torch.testing.assert_close(reply[1], replies[1][1], rtol=0, atol=1e-4)
        assert way.error(device) < 1e-4
    for way in suite.gpt_ways(WORK):
        assert way.build(device)()[0].shape == (WORK.lanes, WORK.num_tokens)
