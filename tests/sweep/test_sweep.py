"""Sweeps: what runs, what is skipped, what is recorded; with a stand-in for the training script."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from neurogen.config.compose import build_config, compose_node
from neurogen.errors import UserError
from neurogen.sweep.config import GridConfig, LocalConfig, OptunaConfig, SlurmConfig, SweepConfig
from neurogen.sweep.launchers import deal_gpus, make_executor
from neurogen.sweep.run import is_sweep, run_sweep
from neurogen.sweep.space import Space

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = str(Path(__file__).with_name("stand_in.py"))


@pytest.fixture
def plots() -> bool:
    return False


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plots: bool) -> None:
    """A summary's plot takes longer than the jobs: one test draws it."""
    monkeypatch.chdir(tmp_path)
    if not plots:
        monkeypatch.setattr("neurogen.sweep.summary._plot", lambda *args: None)


def sweep(*words: str) -> int:
    return run_sweep(STAND_IN, ["-m", "logger=none", "sweep.dir=s", *words])


def summary() -> list[dict[str, Any]]:
    return json.loads(Path("s/summary.json").read_text())["jobs"]


def calls() -> int:
    return sum(len(path.read_text()) for path in Path("s").glob("*/calls"))


@pytest.mark.parametrize("plots", [True])
def test_a_grid_runs_every_combination_once_and_sums_up() -> None:
    assert sweep("optimizer.lr=0.1,0.4", "model=nano,small") == 0
    jobs = summary()
    assert sorted((job["varied"]["optimizer.lr"], job["varied"]["model"]) for job in jobs) == [
        ("0.1", "nano"), ("0.1", "small"), ("0.4", "nano"), ("0.4", "small"),
    ]  # fmt: skip
    assert [job["metrics"]["val/bpb"] for job in jobs] == pytest.approx([0.51, 0.51, 0.54, 0.54])
    table = Path("s/summary.md").read_text()
    assert table.count("| finished |") == 4
    assert Path("s/summary.png").stat().st_size > 1000
    assert calls() == 4
    assert sweep("optimizer.lr=0.1,0.4,0.9", "model=nano,small") == 0  # the same and more: only what is new runs
    assert calls() == 6
    assert len(summary()) == 6


def test_jobs_that_run_together_are_dealt_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2")
    assert deal_gpus(1) == [None]
    assert deal_gpus(3) == ["5", "2", "5"]
    assert sweep("optimizer.lr=0.1,0.2,0.3,0.4", "launcher.at_once=2") == 0
    seen = [path.read_text().split("sees GPUs ")[1].strip() for path in Path("s").glob("*.log")]
    assert set(seen) == {"5", "2"}
    assert len(seen) == 4
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert deal_gpus(2) == [None, None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert deal_gpus(2) == ["0", "1"]


def test_a_failed_job_is_recorded_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("optimizer.lr=0.1,oops,0.4", "seed=12,13") == 1
    jobs = summary()
    states = {(job["varied"]["optimizer.lr"], job["varied"]["seed"]): job for job in jobs}
    assert [job["state"] for job in jobs].count("finished") == 2
    thrown = states["0.1", "13"]
    assert thrown["traceback"].startswith("Traceback (most recent call last)")
    assert thrown["error"] == "RuntimeError: thirteen"
    assert "optimizer.lr" in states["oops", "12"]["error"]  # refused without a process
    assert "RuntimeError: thirteen" in Path("s/summary.md").read_text()
    assert "RuntimeError: thirteen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.lrr=1,2"], "did you mean optimizer.lr?"),
        (["optimizer.lr=interval(0,1)"], "sweep=optuna"),
        (["optimizer.lr=1", "run_dir=a"], "run_dir: a sweep gives each job its own"),
        (["optimizer.lr=1", "sweep.trials=3"], "sweep.trials"),
        (["sweep=optuna", "optimizer.lr=1"], "nothing to search"),
        (["sweep=optuna", "optimizer.lr=tag(log,interval(0,1))"], "optimizer.lr"),
        (["optimizer.lr=1,2", "launcher.at_once=0"], "launcher.at_once=0: must be at least 1"),
        (["optimizer.lr=(1"], "optimizer.lr=(1"),
    ],
)
def test_a_users_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna") if "sweep=optuna" in words else None
    assert sweep(*words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert calls() == 0


def test_a_signal_ends_the_sweep_and_the_next_call_takes_what_is_left() -> None:
    def kill_when_running() -> None:
        while not Path("waiting").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=kill_when_running)
    thread.start()
    assert sweep("optimizer.lr=0.1,0.2", "seed=12,14") == 143
    thread.join()
    states = {(job["varied"]["optimizer.lr"], job["varied"]["seed"]): job["state"] for job in summary()}
    assert states == {("0.1", "12"): "finished", ("0.1", "14"): "interrupted",
                      ("0.2", "12"): "interrupted", ("0.2", "14"): "interrupted"}  # fmt: skip
    assert sweep("optimizer.lr=0.1,0.2", "seed=12") == 0
    assert calls() == 2


def test_the_same_command_line_has_the_same_folder() -> None:
    for words in (["seed=1,2", "optimizer.lr=0.1"], ["optimizer.lr=0.1", "seed=1,2"], ["seed=1,3", "optimizer.lr=0.1"]):
        assert run_sweep(STAND_IN, ["logger=none", *words]) == 0
    assert len(list(Path("runs").glob("sweep-*"))) == 2


def test_jobs_run_at_once_and_go_to_one_group_of_the_logger() -> None:
    assert run_sweep(STAND_IN, ["sweep.dir=s", "launcher.at_once=4", "optimizer.lr=0.1,0.2,0.3,0.4"]) == 0
    for job in summary():
        assert f"logger.run_name='{job['job']}'" in job["overrides"]
        assert "logger.group='s'" in job["overrides"]


SEARCH = ["sweep=optuna", "optimizer.lr=interval(0.0,1.0)", "model=nano,small", "sweep.num_random=4"]


def test_a_search_finds_the_minimum_and_goes_on_where_it_was() -> None:
    pytest.importorskip("optuna")
    assert sweep(*SEARCH, "sweep.num_trials=5") == 0
    first = {job["job"] for job in summary()}
    assert sweep(*SEARCH, "sweep.num_trials=9") == 0
    assert calls() == 9
    second = summary()
    assert len(second) == 9  # nothing was proposed twice
    assert first < {job["job"] for job in second}
    assert all(job["metrics"]["val/bpb"] is not None for job in second)
    assert sweep(*SEARCH, "sweep.num_trials=9") == 0
    assert calls() == 9
    assert summary() == second
    values = [float(path.name.split("lr=")[1].split("-")[0].split(",")[0]) for path in Path("s").glob("*lr=*.json")]
    assert min(abs(value - 0.3) for value in values) < 0.1


def test_a_search_counts_failures_and_repeats_what_was_cut_short() -> None:
    optuna = pytest.importorskip("optuna")
    space = ["sweep=optuna", "optimizer.lr=interval(0.0,1.0)", "seed=12,13", "sweep.num_random=8"]
    assert sweep(*space, "sweep.num_trials=6") == 1
    study = optuna.load_study(study_name="neurogen", storage="sqlite:///s/optuna.db")
    failed = [trial for trial in study.trials if trial.state.name == "FAIL"]
    assert failed
    assert {trial.params["seed"] for trial in failed} == {"13"}
    cut = study.ask(Space.parse(space[1:3]).distributions())  # as a killed process leaves it
    assert sweep(*space, "sweep.num_trials=7") in (0, 1)
    assert len(study.trials) == 8
    assert study.trials[-1].params == cut.params
    with pytest.raises(UserError, match="another space"):
        raise_errors("sweep=optuna", "sweep.dir=s", "seed=1,2")


def raise_errors(*words: str) -> None:
    from neurogen.sweep.run import _run_sweep

    _run_sweep(STAND_IN, ["logger=none", *words])


def test_the_groups_compose_to_their_schemas() -> None:
    def composed(*words: str) -> SweepConfig:
        return build_config(compose_node(words, config_name="sweep"), SweepConfig)

    assert composed() == SweepConfig(GridConfig(), LocalConfig())
    found = composed("sweep=optuna", "launcher=slurm", "launcher.partition=h200", "launcher.timeout_minutes=90")
    assert found == SweepConfig(OptunaConfig(), SlurmConfig(partition="h200", timeout_minutes=90))


def test_slurm_gets_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")
    for name in ("srun", "sbatch"):  # submitit only looks for it
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    executor = make_executor(SlurmConfig(partition="h200", timeout_minutes=90, gpus_per_node=2), tmp_path)
    assert isinstance(executor._executor, submitit.SlurmExecutor)
    text = executor._executor._make_submission_file_text("train", "1")
    for line in ("--partition=h200", "--time=90", "--gpus-per-node=2", "--cpus-per-task=8"):
        assert f"#SBATCH {line}" in text


@pytest.mark.slow
def test_submitit_runs_jobs() -> None:
    pytest.importorskip("submitit")
    assert sweep("optimizer.lr=0.1,0.4", "seed=12,13", "launcher=slurm", "launcher.cluster=local") == 1
    assert sorted(job["state"] for job in summary()) == ["failed", "failed", "finished", "finished"]
    assert {job["error"] for job in summary()} == {"", "RuntimeError: thirteen"}


def test_what_is_a_sweep() -> None:
    assert is_sweep(["-m", "seed=1,2"])
    assert is_sweep(["--multirun"])
    assert is_sweep(["sweep=optuna"])
    assert not is_sweep(["seed=1", "run_dir=sweep"])


@pytest.mark.slow
def test_real_jobs(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(200)))
    words = ["experiment=test", "data=text", "data.path=notes.txt", "trainer.max_steps=2", "model.embedding_dim=16,24"]
    words += ["trainer.device=cpu,cuda:9", "sweep.dir=s"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NEUROGEN_CACHE": "cache"}
    command = [sys.executable, str(ROOT / "scripts/train.py"), "-m", *words]
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 1, done.stderr
        assert [job["state"] for job in summary()].count("finished") == 2
        assert "error: device=cuda:9: this machine has" in done.stderr
        assert "Traceback" not in done.stderr
    assert done.stderr.count("already finished") == 2
    assert all(job["metrics"]["val/bpb"] > 7 for job in summary() if job["state"] == "finished")
