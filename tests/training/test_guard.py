"""What is skipped, what a stuck run leaves, and that replaying it names the culprit."""

import gc
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from neurogen.config.compose import compose_config
from neurogen.config.schema import AdamWConfig, Config, ModeConfig
from neurogen.errors import UserError
from neurogen.training.checkpoint import load_checkpoint
from neurogen.training.dry_run import check_memory
from neurogen.training.guard import NUM_REMEMBERED, Guard
from neurogen.training.metrics import read_metrics
from neurogen.training.optimizer import build_optimizer
from neurogen.training.replay import NonFiniteWatch, replay
from neurogen.training.run import train
from neurogen.training.update import Update

CPU = torch.device("cpu")


def judge(guard: Guard, loss: float, norm: float) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm))[0])


def test_outliers_are_those_of_the_definition() -> None:
    """Against the definition in numpy, step by step, with jumps and non-finite values among them."""
    random = np.random.default_rng(0)
    guard = Guard(CPU, sigma=3.0)
    remembered: list[tuple[float, float]] = []
    skipped = []
    for step in range(400):
        loss, norm = 2.0 + 0.1 * random.standard_normal(), 1.0 + 0.5 * abs(random.standard_normal())
        if step % 50 == 7:
            norm *= 20.0
        if step % 90 == 11:
            loss = math.nan if step % 180 == 11 else math.inf
        limits = np.array([math.inf, math.inf])
        if len(remembered) >= NUM_REMEMBERED:
            last = np.array(remembered[-NUM_REMEMBERED:])
            limits = np.maximum(last.mean(0) + 3.0 * last.std(0, ddof=1), 2.0 * last.mean(0))
        finite = math.isfinite(loss)
        expected = not finite or loss > limits[0] or norm > limits[1]
        if finite:
            remembered.append((min(np.float32(loss), limits[0]), min(np.float32(norm), limits[1])))
        skipped.append(judge(guard, loss, norm))
        assert skipped[-1] == expected, step
    assert sum(skipped[:NUM_REMEMBERED]) == 2  # the two that are not finite: nothing is an outlier yet
    assert sum(skipped) >= 10


def test_a_lasting_change_of_level_is_accepted() -> None:
    guard = Guard(CPU, sigma=3.0)
    for step in range(NUM_REMEMBERED):
        assert not judge(guard, 1.0 + 0.01 * (step % 3), 1.0)
    refused = [judge(guard, 3.0, 1.0) for _ in range(NUM_REMEMBERED)]
    assert refused[0]
    assert not refused[-1]


def test_without_a_sigma_only_what_is_not_finite_is_skipped() -> None:
    guard = Guard(CPU)
    assert [judge(guard, 1.0, 1.0) for _ in range(200)] == [False] * 200
    assert not judge(guard, 1e30, 1e30)
    assert [judge(guard, *pair) for pair in ((math.nan, 1.0), (1.0, math.inf))] == [True, True]
    assert guard.num_in_a_row() == 2
    assert not judge(guard, 1.0, 1.0)
    assert guard.num_in_a_row() == 0


def test_a_guard_goes_on_from_its_state() -> None:
    one, other = Guard(CPU, sigma=4.0), Guard(CPU, sigma=4.0)
    for step in range(200):
        judge(one, 1.0 + 0.1 * (step % 5), 1.0)
    other.load_state(one.state())
    assert torch.equal(one.limits(), other.limits())
    with pytest.raises(UserError, match="incomplete"):
        other.load_state({"count": torch.zeros(())})


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, power: float) -> torch.Tensor:
        return torch.log(self.second(self.first(x)).abs() ** power)


def test_the_watch_names_the_operation_and_the_module() -> None:
    torch.manual_seed(0)
    model = Sums()
    with torch.no_grad():
        model.second.weight.fill_(3e38)
    with NonFiniteWatch(model).watching() as watch:
        model(torch.full((2, 3), 100.0), 1.0)
    assert watch.finding is not None
    assert watch.finding.op in ("aten.addmm.default", "aten.mm.default")
    assert (watch.finding.module, watch.finding.phase, watch.finding.shape) == ("second", "forward", (2, 3))
    assert not model._forward_hooks


def test_the_watch_names_a_backward_operation_by_the_module_that_made_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Softplus(), nn.Linear(2, 1, bias=False))
    root = Sqrt()
    with NonFiniteWatch(nn.ModuleDict({"net": model, "root": root})).watching() as watch:
        root(0.0 * model(torch.ones(1, 2))).sum().backward()
    assert watch.finding is not None
    assert (watch.finding.phase, watch.finding.module) == ("backward", "root")
    assert watch.finding.num_inf + watch.finding.num_nan == 1


class Sqrt(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.masked_fill(torch.sqrt(x), x < 0, -math.inf)  # an infinity on purpose is not to blame


def test_the_watch_finds_nothing_where_all_is_well() -> None:
    with NonFiniteWatch(model := Sums()).watching() as watch:
        model(torch.ones(2, 3), 1.0).sum().backward()
    assert watch.finding is None


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("neurogen.training.recorder.plot_run", lambda path: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEUROGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(99)))
    return tmp_path


def configure(*overrides: str) -> Config:
    base = ["experiment=test", "data=text", "data.path=notes.txt", "trainer.evaluate_every=0", "trainer.sample_every=0"]
    return compose_config([*base, "run_dir=a", *overrides])


def test_a_stuck_run_stops_with_a_bundle_that_replays(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Update.__call__
    steps = []

    def poisoned(self: Update, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            with torch.no_grad():
                self.model.get_parameter("brain.pfc.0.in_proj.weight").fill_(3e38)
        return call(self, *args)

    monkeypatch.setattr(Update, "__call__", poisoned)
    with pytest.raises(UserError, match=r"2 steps in a row were skipped up to step 4.*replay.py bundle=a/replay/step"):
        train(configure("trainer.max_skipped_in_a_row=2", "trainer.accumulation=2"))
    assert json.loads((text / "a/status.json").read_text())["state"] == "failed"
    assert [row["step"] for row in read_metrics("a/metrics.jsonl")] == [1, 2, 3]
    bundle = load_checkpoint("a/replay/step-00000004")
    tensors = bundle.state_tensors.load()
    assert tensors["batch/input_ids"].shape == (4, 16)
    assert tensors["brain/position"].tolist() == [48] * 4  # before the step that reads tokens 48 to 63
    lines = replay("a/replay/step-00000004", mode=ModeConfig(), device="cpu", dtype="float32")
    assert "in module brain.pfc.0 (forward pass, kernels/memory_circuit/reference.py" in lines[-1]
    assert "aten.mm" in lines[-1] or "aten.addmm" in lines[-1] or "aten.linear" in lines[-1]
    lines = replay("a/replay/step-00000004", mode=ModeConfig(), device="cpu", dtype="float64")  # wide enough for 3e38
    assert "memory_circuit" not in lines[-1]


def test_what_is_no_bundle_is_refused(text: Path) -> None:
    train(configure("trainer.max_steps=1"))
    with pytest.raises(UserError, match="is a checkpoint without a batch"):
        replay("a", mode=ModeConfig(), device="cpu", dtype="auto")


@pytest.mark.parametrize(
    ("lanes", "accumulation", "fits", "message"),
    [
        (12, 1, 12, None),
        (12, 1, 5, r"1 part.*trainer.accumulation=3 fits"),
        (12, 2, 1, r"2 part.*trainer.accumulation=12 fits"),
        (7, 1, 6, r"trainer.accumulation=7 fits"),
        (4, 1, 0, r"nor does a single lane of data.window=64; lower data.window"),
    ],
)
def test_the_suggestion_is_the_first_that_fits(lanes: int, accumulation: int, fits: int, message: str | None) -> None:
    tried = []

    def attempt(parts: int) -> None:
        tried.append(parts)
        if lanes // parts > fits:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    if message is None:
        check_memory(attempt, lanes=lanes, accumulation=accumulation, window=64, search=True)
        assert tried == [accumulation]
        return
    with pytest.raises(UserError, match=message):
        check_memory(attempt, lanes=lanes, accumulation=accumulation, window=64, search=True)


def test_a_dry_run_finds_out_before_the_first_step_and_leaves_no_trace(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(configure("trainer.max_steps=2"))
    train(configure("run_dir=b", "trainer.max_steps=2", "trainer.dry_run=true"))
    one, other = load_checkpoint("a"), load_checkpoint("b")
    for name, tensor in one.model_tensors.load().items():
        assert torch.equal(tensor, other.model_tensors.load()[name]), name
    assert one.metadata["data_position"] == other.metadata["data_position"]

    backward = Update.backward

    def small(self: Update, batches: Any, states: Any, **options: Any) -> Any:
        if batches[0].input_ids.shape[0] > 2:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return backward(self, batches, states, **options)

    monkeypatch.setattr(Update, "backward", small)
    with pytest.raises(UserError, match=r"does not fit into memory \(tried.*; trainer.accumulation=2 fits"):
        train(configure("run_dir=c", "trainer.dry_run=true"))
    assert not (text / "c/metrics.jsonl").read_text()
    train(configure("run_dir=d", "trainer.dry_run=true", "trainer.accumulation=2", "trainer.max_steps=1"))


def test_outliers_in_a_run_are_counted(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurogen.training.guard.NUM_REMEMBERED", 3)
    call, steps = Update.__call__, []

    def jump(self: Update, *args: Any) -> Any:
        steps.append({name: param.clone() for name, param in self.model.named_parameters()})
        if len(steps) != 6:
            return call(self, *args)
        handle = self.model.decoder.weight.register_hook(lambda grad: grad * 1e6)
        result = call(self, *args)
        handle.remove()
        return result

    monkeypatch.setattr(Update, "__call__", jump)
    train(configure("trainer.max_steps=7"))
    rows = read_metrics("a/metrics.jsonl")
    assert [row["train/skipped_steps"] for row in rows] == [0, 0, 0, 0, 0, 1, 1]
    assert all(torch.equal(steps[5][name], steps[6][name]) for name in steps[5])


class NoReading(TorchDispatchMode):
    """Fails where the host asks for a number, which on a GPU would make it wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "local_scalar_dense" not in str(func), "the host read a number"
        return func(*args, **(kwargs or {}))


def test_judging_and_skipping_read_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = build_optimizer(model, AdamWConfig())
    guard = Guard(CPU, sigma=4.0)
    before = model.weight.detach().clone()
    with NoReading():
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step(skip=guard.judge(torch.tensor(math.nan), torch.tensor(1.0))[0])
    assert torch.equal(model.weight, before)
    with pytest.raises(AssertionError, match="the host read"), NoReading():
        float(torch.ones(()))


@pytest.mark.gpu
def test_a_step_on_a_gpu_does_not_wait(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Update.__call__

    def strict(self: Update, *args: Any, **options: Any) -> Any:
        try:
            torch.cuda.set_sync_debug_mode("error")
            return call(self, *args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Update, "__call__", strict)
    train(configure("trainer.device=cuda", "trainer.max_steps=5", "model.column_width=16", "model.head_width=16"))


@pytest.mark.gpu
def test_a_dry_run_on_a_gpu_suggests_what_fits(text: Path) -> None:
    big = ["trainer.device=cuda", "mode=unfused", "data.lanes=16", "data.window=64", "model.embedding_dim=256"]
    big += ["trainer.max_steps=1", "data.batching=random"]

    def reserved_by(*overrides: str) -> int:
        gc.collect()
        torch.cuda.empty_cache()  # tests before this one may hold some
        torch.cuda.reset_peak_memory_stats()
        train(configure(*big, *overrides))
        return torch.cuda.max_memory_reserved()

    whole, parts = reserved_by("run_dir=whole"), reserved_by("run_dir=parts", "trainer.accumulation=16")
    assert parts < 0.8 * whole, "a step in parts takes no less, so there is nothing to suggest"
    gc.collect()
    torch.cuda.empty_cache()
    allowed = (whole + parts) / 2
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(UserError, match=r"does not fit into memory.*; trainer.accumulation=\d+ fits") as caught:
            train(configure(*big, "run_dir=a"))
        gc.collect()
        torch.cuda.empty_cache()
        fits = str(caught.value).split("accumulation=")[1].split()[0]
        train(configure(*big, "run_dir=b", f"trainer.accumulation={fits}"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
