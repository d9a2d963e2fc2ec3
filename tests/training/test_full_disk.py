"""A disk that is full while a run trains: the run goes on or stops, as configured, and its checkpoints are intact."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import full_disk_runs
import pytest
import small_file_system
import torch

from neurogen.config.compose import compose_config
from neurogen.errors import UserError
from neurogen.training import checkpoint
from neurogen.training.checkpoint import list_checkpoints, load_checkpoint
from neurogen.training.metrics import MetricsWriter, read_metrics
from neurogen.training.run import train
from neurogen.training.run_directory import RunDirectory
from neurogen.training.update import Update

BASE = [
    "experiment=test", "data=text", "data.path=notes.txt", "trainer.evaluate_every=0", "trainer.sample_every=0",
    "trainer.checkpoint_every=2", "trainer.max_steps=8", "trainer.evaluate_tokens=64", "trainer.sample_prompts=['']",
    "trainer.sample_tokens=2",
]  # fmt: skip
NEVER = 1000
CASES = {  # the steps to fill the disk before and to free it before, and what to do about it
    "undisturbed": (NEVER, NEVER, "stop"),
    "freed": (3, 6, "continue"),
    "full to the end": (3, NEVER, "continue"),
    "stopping": (3, NEVER, "stop"),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("disk")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["NEUROGEN_CACHE"] = str(folder / "cache")
    command = [*small_file_system.mounted_on(folder, megabytes=8), sys.executable, full_disk_runs.__file__]
    words = [str(folder), json.dumps(CASES), *BASE]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def undisturbed(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return reports["undisturbed"]["first"]


def assert_ends_as(report: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """With room again the run ends as one that never lacked it, and no row is missing or twice."""
    assert report["outcome"] == 0
    assert report["weights"] == undisturbed["weights"]
    losses = [[(row["step"], row.get("train/loss")) for row in one["rows"]] for one in (report, undisturbed)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 9))


def test_room_again_before_the_end(reports: dict[str, dict[str, Any]], undisturbed: dict[str, Any]) -> None:
    report = reports["freed"]
    assert_ends_as(report["first"], undisturbed)
    assert report["first"]["checkpoints"] == report["first"]["leftovers"]
    assert report["first"]["checkpoints"][-1] == "step-00000008"
    assert report["first"]["rows"][-1]["disk/failures"] >= 1
    assert undisturbed["rows"][-1]["disk/failures"] == 0
    assert "checkpoint of step 4 not saved: No space left on device" in report["said"]


def test_no_room_to_the_end(reports: dict[str, dict[str, Any]], undisturbed: dict[str, Any]) -> None:
    report = reports["full to the end"]
    assert report["first"]["checkpoints"] == report["first"]["leftovers"] == ["step-00000002"]
    assert "checkpoint of step 8 not saved: No space left on device" in report["first"]["outcome"]
    assert "step-00000002 is the last good one: free some space, then resume=run" in report["first"]["outcome"]
    assert_ends_as(report["resumed"], undisturbed)


def test_stopping_without_room(reports: dict[str, dict[str, Any]], undisturbed: dict[str, Any]) -> None:
    report = reports["stopping"]
    assert report["first"]["checkpoints"] == report["first"]["leftovers"] == ["step-00000002"]
    assert "step-00000002 is the last good one" in report["first"]["outcome"]
    assert "checkpoint of step 8" not in report["said"]
    assert_ends_as(report["resumed"], undisturbed)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("neurogen.training.recorder.plot_run", lambda path: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEUROGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(99)))
    return tmp_path


def refuse_save(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of the number-th save only."""
    saves = []

    def reached(stage: str) -> None:
        saves.extend([stage] if stage == "begun" else [])
        if len(saves) == number and stage == "model.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "reached", reached)


def test_stopping_with_room_for_one_more_try(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_save(2, monkeypatch)
    assert train(compose_config([*BASE, "run_dir=a", "trainer.on_save_failure=stop"])) == 74
    stopped = load_checkpoint("a").step
    assert 4 < stopped < 8  # it is known at the latest when the next save begins
    assert "step-00000004" not in [path.name for path in list_checkpoints(text / "a/checkpoints")]
    status = json.loads((text / "a/status.json").read_text())
    assert (status["state"], status["step"]) == ("interrupted", stopped)
    assert status["reason"] == "notice of a failed save (trainer.on_save_failure=stop) received"
    err = capsys.readouterr().err
    assert err.count("checkpoint of step 4 not saved: No space left on device") == 1
    assert "continue with: python scripts/train.py resume=a" in err
    monkeypatch.setattr(checkpoint, "reached", lambda stage: None)
    train(compose_config([*BASE, "resume=a"]))
    train(compose_config([*BASE, "run_dir=b"]))
    for name, tensor in load_checkpoint("a").model_tensors.load().items():
        assert torch.equal(tensor, load_checkpoint("b").model_tensors[name]), name


def test_rows_and_status_that_are_refused_come_later(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call, write, write_status = Update.__call__, MetricsWriter.write, RunDirectory.write_status
    steps: list[int] = []

    def refused(function: Any) -> Any:
        def during_steps_2_to_5(*args: Any, **kwargs: Any) -> Any:
            if 2 <= len(steps) <= 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return during_steps_2_to_5

    def counted(self: Update, *args: Any) -> Any:
        steps.append(1)
        return call(self, *args)

    monkeypatch.setattr(Update, "__call__", counted)
    monkeypatch.setattr(MetricsWriter, "write", refused(write))
    monkeypatch.setattr(RunDirectory, "write_status", refused(write_status))
    assert train(compose_config([*BASE, "run_dir=a"])) == 0
    rows = read_metrics("a/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["disk/failures"] > 0 for row in rows] == [False, False, *[True] * 6]
    assert json.loads((text / "a/status.json").read_text())["state"] == "finished"
    err = capsys.readouterr().err
    assert err.count("metrics.jsonl not written: No space left on device") == 1
    assert err.count("status.json not written: No space left on device") == 1


def test_the_policy_is_checked() -> None:
    with pytest.raises(UserError, match=r"trainer\.on_save_failure=maybe: unknown; choose one of stop, continue"):
        compose_config(["trainer.on_save_failure=maybe"])
