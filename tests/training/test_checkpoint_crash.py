"""Kill the process while it saves, and fill its disk: the newest complete checkpoint always loads."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import checkpoint_faults
import pytest
import small_file_system
import torch

from neurogen.training import checkpoint
from neurogen.training.checkpoint import CheckpointNotSaved, find_latest, list_checkpoints, load_checkpoint

PROGRAM = Path(checkpoint_faults.__file__)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def run(*arguments: object, wrapper: tuple[str, ...] = ()) -> list[dict]:
    """Run the program that dies, or not, as told; return its reports."""
    command = [*wrapper, sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_whole(folder: Path, *, step: int, mark: int = 0) -> None:
    """The newest checkpoint is of this step and mark, in every one of its parts."""
    loaded = load_checkpoint(folder)
    value = 1000.0 * mark + step
    assert (loaded.step, loaded.metadata) == (step, {"mark": mark, "tokens": 512 * step})
    assert torch.equal(loaded.model_tensors["weight"], torch.full((64, 65), value))
    assert torch.equal(loaded.optimizer_tensors["momentum"], torch.full((64, 65), -value))
    assert torch.equal(loaded.state_tensors["membrane_voltage"], torch.full((4, 7), value, dtype=torch.float64))
    assert (loaded.tokenizer_dir / "more" / "merges.txt").read_text() == "a b\n"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Of every kind that needs no file system of its own, from one process."""
    folder = tmp_path_factory.mktemp("faults")
    return run("stages", folder / "stages", "moments", folder / "moments", 12, "limit", folder / "limit")


@pytest.fixture
def killed(reports: list[dict]) -> list[dict]:
    return [case for case in reports if case["kind"] == "stages"]


def test_kill_at_every_stage_leaves_the_newest_complete_checkpoint(killed: list[dict]) -> None:
    stages = {case["stage"] for case in killed}
    assert {"begun", "model.safetensors", "tokenizer", "metadata", "synced", "renamed", "doomed"} <= stages
    assert "set aside" in stages
    for case in killed:
        folder = Path(case["folder"])
        # The two stages of replacing and deleting are not met by every save; every other one kills.
        optional = {"set aside"} if case["step"] == 3 else set()
        assert case["status"] == -signal.SIGKILL or (case["stage"] in optional and case["status"] == 0), case
        is_new = case["stage"] in ("renamed", "published", "retention") or case["status"] == 0
        if case["stage"] == "doomed":  # met after the new folder has its name, in both kinds of case
            is_new = True
        if is_new:
            assert_whole(folder, step=case["step"], mark=case["mark"])
        else:
            assert_whole(folder, step=2)


def test_saving_goes_on_after_every_kill_and_sweeps_up(killed: list[dict]) -> None:
    for case in killed:
        folder = Path(case["folder"])
        checkpoint_faults.save(folder, 4, mark=5)
        assert_whole(folder, step=4, mark=5)
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in list_checkpoints(folder))
        assert len(list_checkpoints(folder)) == checkpoint_faults.KEEP_LAST


def assert_nothing_lost(cases: list[dict]) -> None:
    for case in cases:
        newest = load_checkpoint(case["folder"]).step
        assert newest in (case["acknowledged"], case["acknowledged"] + 1)
        assert_whole(Path(case["folder"]), step=newest)


def test_kill_at_random_moments_loses_nothing_that_was_saved(reports: list[dict]) -> None:
    cases = [case for case in reports if case["kind"] == "moments"]
    assert len(cases) == 12
    assert_nothing_lost(cases)


@pytest.mark.slow
def test_kill_at_many_moments(tmp_path: Path) -> None:
    cases = run("moments", tmp_path, 500)
    assert len(cases) == 500
    assert_nothing_lost(cases)


def test_a_real_write_error_leaves_the_last_good_checkpoint(reports: list[dict]) -> None:
    (report,) = [case for case in reports if case["kind"] == "limit"]
    assert report["errno"] == errno.EFBIG
    assert "step 2 not saved" in report["error"]
    folder = Path(report["folder"])
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert_whole(folder, step=1)


def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    (report,) = run("fill", tmp_path, wrapper=small_file_system.mounted_on(tmp_path, megabytes=2))
    assert report["errno"] == errno.ENOSPC
    assert report["newest"] == report["failed"] - 1 >= 2
    assert report["weight"] == [float(report["newest"])]
    assert report["names"] == [f"step-{step:08d}" for step in range(1, report["failed"])]


@pytest.mark.parametrize(
    "stage", ["begun", "model.safetensors", "state.safetensors", "tokenizer", "metadata", "synced"]
)
def test_full_disk_at_each_stage_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    checkpoint_faults.save(tmp_path, 1)

    def fill_disk(now: str) -> None:
        if now == stage:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "reached", fill_disk)
    with pytest.raises(CheckpointNotSaved, match="step 2 not saved: No space left on device") as caught:
        checkpoint_faults.save(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_whole(tmp_path, step=1)
    monkeypatch.undo()
    assert find_latest(tmp_path) == tmp_path / "step-00000001"
    checkpoint_faults.save(tmp_path, 2)
    assert_whole(tmp_path, step=2)
