"""Two processes train as one: the same curve, the same parameters, checkpoints that load either way (gloo, CPU)."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_pair import ROOT, free_ports, run_pair

from kernels.linear import RoundedWeights
from neurogen.config.compose import compose_config
from neurogen.errors import UserError
from neurogen.training.checkpoint import load_checkpoint
from neurogen.training.distributed import SINGLE, World, connect, shard_like, whole
from neurogen.training.metrics import read_metrics
from neurogen.training.run import train

WORKER = Path(__file__).with_name("distributed_worker.py")
TIMINGS = ("seconds", "throughput/tokens_per_second", "memory/peak_bytes")
BASE = [
    "experiment=test", "data=text", "data.path=file*.txt", "data.validation_fraction=0.2", "trainer.dtype=float64",
    "trainer.max_steps=6", "trainer.evaluate_every=3", "trainer.evaluate_tokens=128", "trainer.sample_prompts=['']",
    "trainer.sample_tokens=2", "trainer.checkpoint_every=0", "model.tie_embedding=true",
]  # fmt: skip
# What two processes run, each compared with one process and the same overrides; `->` continues the first run.
RUNS: dict[str, list[str]] = {
    "ddp": ["trainer.distributed=ddp", "trainer.accumulation=2", "trainer.log_every=2"],
    "random": ["trainer.distributed=ddp", "data.batching=random", "model.tie_embedding=false"],
    "fsdp": ["trainer.distributed=fsdp", "trainer.accumulation=2", "trainer.log_every=2"],
    "muon": ["trainer.distributed=fsdp", "optimizer=muon", "model.tie_embedding=false", "mode=pointer"],
    "half": ["trainer.distributed=ddp", "trainer.accumulation=2", "trainer.log_every=2", "trainer.stop_at_step=3"],
    "rest": ["trainer.distributed=fsdp", "trainer.accumulation=2", "trainer.log_every=2", "resume=one_half"],
    "sharded_half": [
        "trainer.distributed=fsdp",
        "trainer.accumulation=2",
        "trainer.log_every=2",
        "trainer.stop_at_step=3",
    ],
    "sharded_rest": ["trainer.distributed=ddp", "trainer.accumulation=2", "trainer.log_every=2", "resume=sharded_copy"],
    "signal": ["trainer.distributed=ddp"],
    "odd": ["trainer.distributed=ddp", "data.lanes=3"],
}


def overrides(name: str, *more: str) -> list[str]:
    place = [] if any(word.startswith("resume=") for word in [*RUNS[name], *more]) else [f"run_dir={name}"]
    return [*BASE, *RUNS[name], *more, *place]


def run_alone(name: str, *more: str) -> None:
    words = [word for word in overrides(name, *more) if not word.startswith("trainer.distributed")]
    place = [] if any(word.startswith("resume=") for word in words) else [f"run_dir=one_{name}"]
    train(compose_config([word for word in words if not word.startswith("run_dir")] + place))


def run_together(folder: Path, environment: dict[str, str]) -> None:
    for name in RUNS:
        (folder / f"{name}.json").write_text(json.dumps(overrides(name)))
    jobs = [f"{port}:{name}" for port, name in zip(free_ports(len(RUNS)), RUNS)]
    run_pair(WORKER, str(folder), *jobs, environment=environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run of RUNS by two processes (`<name>`) and by one (`one_<name>`)."""
    folder = tmp_path_factory.mktemp("distributed")
    for number in range(6):
        body = "".join(f"def f{number}_{i}(x):\n    return x + {i * number}\n\n" for i in range(12))
        (folder / f"file{number}.txt").write_text(body)
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("NEUROGEN_CACHE", str(folder / "cache"))
    patch.setattr("neurogen.training.recorder.plot_run", lambda path: [])
    try:
        for name in ("ddp", "random", "muon", "half"):
            run_alone(name)
        run_together(folder, {"NEUROGEN_CACHE": str(folder / "cache")})
        for name in ("half", "sharded_half"):  # 2 -> 1
            train(compose_config([*BASE, "trainer.accumulation=2", "trainer.log_every=2", f"resume={name}"]))
    finally:
        patch.undo()
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    """What does not depend on how the lanes are divided: a neuron silent in one part may fire in another."""
    return [
        {key: value for key, value in row.items() if key not in TIMINGS and not key.endswith(("/silent", "/saturated"))}
        for row in read_metrics(path)
    ]


def assert_same(folder: Path, ours: str, theirs: str) -> None:
    one, other = rows(folder / ours / "metrics.jsonl"), rows(folder / theirs / "metrics.jsonl")
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for left, right in zip(one, other):
        health = {key for key in left if key.startswith("health/")}  # measured in float32
        assert {key: left[key] for key in health} == pytest.approx({key: right[key] for key in health}, rel=1e-5)
        assert {key: left[key] for key in left.keys() - health} == pytest.approx(
            {key: right[key] for key in right.keys() - health}, rel=1e-9, abs=1e-12
        )
    mine, yours = load_checkpoint(folder / ours), load_checkpoint(folder / theirs)
    for kind in ("model_tensors", "optimizer_tensors", "state_tensors"):
        left, right = getattr(mine, kind).load(), getattr(yours, kind).load()
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            torch.testing.assert_close(tensor, right[name], rtol=1e-9, atol=1e-11, msg=f"{kind}: {name}")
    for key in ("tokens", "data_position"):
        assert mine.metadata[key] == yours.metadata[key]


@pytest.mark.parametrize("name", ["ddp", "random", "muon"])
def test_two_processes_are_one(runs: Path, name: str) -> None:
    assert_same(runs, name, f"one_{name}")


def test_sharded_is_whole(runs: Path) -> None:
    assert_same(runs, "fsdp", "one_ddp")


@pytest.mark.parametrize("name", ["half", "sharded_half"])
def test_a_checkpoint_of_two_loads_in_one(runs: Path, name: str) -> None:
    assert_same(runs, name, "one_ddp")


def test_a_checkpoint_of_two_that_shard_loads_in_two_that_do_not(runs: Path) -> None:
    assert_same(runs, "sharded_copy", "one_ddp")


def test_a_checkpoint_of_one_loads_in_two_that_shard(runs: Path) -> None:
    assert_same(runs, "one_half", "one_ddp")


def test_one_process_writes(runs: Path) -> None:
    assert len(list((runs / "ddp" / "samples").iterdir())) == len(list((runs / "one_ddp" / "samples").iterdir())) > 0
    assert (runs / "ddp/samples/step-00000006.txt").read_text() == (
        runs / "one_ddp/samples/step-00000006.txt"
    ).read_text()
    assert json.loads((runs / "ddp/status.json").read_text())["state"] == "finished"
    for name in ("ddp", "fsdp", "rest"):
        assert [(runs / f"{name}.{rank}.outcome").read_text() for rank in (0, 1)] == ["code 0", "code 0"]


def test_a_signal_to_one_ends_all_and_is_saved(runs: Path) -> None:
    assert [(runs / f"signal.{rank}.outcome").read_text() for rank in (0, 1)] == ["code 143", "code 143"]
    assert load_checkpoint(runs / "signal").step == 1
    assert json.loads((runs / "signal/status.json").read_text())["state"] == "interrupted"


def test_lanes_that_do_not_divide_are_refused_by_all(runs: Path) -> None:
    for rank in (0, 1):
        assert (
            "data.lanes / trainer.accumulation=3: must be a multiple of the 2 processes"
            in (runs / f"odd.{rank}.outcome").read_text()
        )


def test_torchrun_and_the_configuration_have_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="start it with torchrun"):
        connect("ddp", "cpu")
    assert connect("none", "cpu") is SINGLE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun started 2 processes; use trainer=ddp or fsdp"):
        connect("none", "cpu")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="each process takes a GPU of its own"):
        connect("ddp", "cuda:1")


def test_what_is_kept_of_a_gathered_weight_is_made_anew_in_each_pass() -> None:
    """FSDP writes new values behind the version counter, and the allocator gives the old address again."""

    class Layer(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.weight._version, store.get([self.weight], torch.bfloat16), self.weight.detach().clone()))
            return super().forward(x)

    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    store = RoundedWeights()
    model = torch.nn.Sequential(Layer(8, 8), torch.nn.Linear(8, 1))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = World("fsdp")
        spread = world.spread(model, [model[0]])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            spread(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            with torch.no_grad(), world.gathered(model):
                model(torch.ones(2, 8))
    finally:
        dist.destroy_process_group()
    versions = [version for version, _, _ in seen]
    assert len({float(weight[0, 0]) for _, _, weight in seen}) == 5  # before each step, and after the last
    assert all(later > earlier for earlier, later in itertools.pairwise(versions))
    assert torch.equal(seen[-1][1], seen[-1][2].bfloat16())


def test_a_world_of_one_is_trivial() -> None:
    tensor = torch.arange(6.0).reshape(3, 2)
    assert SINGLE.sum(tensor) is tensor
    assert SINGLE.all_lanes(tensor) is tensor
    assert (SINGLE.sum_count(3), SINGLE.highest(4), SINGLE.from_main(0.5)) == (3, 4, 0.5)
    assert whole(tensor) is tensor
    assert shard_like(tensor, tensor) is tensor


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun(runs: Path, strategy: str) -> None:
    words = [word for word in overrides("ddp") if not word.startswith(("trainer.distributed", "run_dir"))]
    words += [f"trainer={strategy}", f"run_dir=torchrun_{strategy}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NEUROGEN_CACHE": "cache"}
    done = subprocess.run(
        [*command, str(ROOT / "scripts/train.py"), *words],
        cwd=runs, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(runs, f"torchrun_{strategy}", "one_ddp")
