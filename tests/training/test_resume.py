from pathlib import Path

import pytest
import torch

from neurogen.errors import UserError
from neurogen.training.checkpoint import load_checkpoint, save_checkpoint
from neurogen.training.resume import config_difference, find_unfinished, prepare_run
from neurogen.training.run_directory import RunDirectory, config_fingerprint

CONFIG = {"seed": 1, "model": {"depth": 2}, "run_dir": None, "resume": None}


def make_run(path: Path, *, state: str = "running", steps: tuple[int, ...] = (1, 2), config: dict = CONFIG) -> Path:
    """A run as a killed process leaves it."""
    with RunDirectory.create(path, config=config) as run:
        for step in steps:
            save_checkpoint(run.checkpoints, step=step, model_tensors={"a": torch.zeros(1)})
        run.write_status(state, step=max(steps, default=0), tokens=0, seconds=0.0)
    return path


def prepare(root: Path, *, run_dir: Path | None = None, resume: Path | str | None = None, config: dict = CONFIG):
    run, checkpoint = prepare_run(
        run_dir=None if run_dir is None else str(run_dir),
        resume=None if resume is None else str(resume),
        config={**config, "resume": str(resume)},
        root=root,
    )
    run.close()
    return run.path, None if checkpoint is None else checkpoint.step


def test_a_new_run(tmp_path: Path) -> None:
    path, step = prepare(tmp_path)
    assert path.parent == tmp_path
    assert step is None
    assert prepare(tmp_path, run_dir=tmp_path / "here") == (tmp_path / "here", None)


def test_resuming_a_run_or_one_of_its_checkpoints(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    assert prepare(tmp_path, resume=path) == (path, 2)
    assert prepare(tmp_path, resume=path, run_dir=path) == (path, 2)
    assert prepare(tmp_path, resume=path / "checkpoints" / "step-00000001") == (path, 1)


def test_a_run_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", steps=())
    assert prepare(tmp_path, resume=path) == (path, None)


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="not a run directory"):
        prepare(tmp_path, resume=tmp_path / "gone")
    with pytest.raises(UserError, match="leave run_dir out"):
        prepare(tmp_path, resume=path, run_dir=tmp_path / "other")
    with RunDirectory.open(path), pytest.raises(UserError, match="is live"):
        prepare(tmp_path, resume=path)
    with open(path / "checkpoints" / "step-00000002" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(UserError, match="not what was written"):
        prepare(tmp_path, resume=path)
    # The refusal gave the lock back.
    assert prepare(tmp_path, resume=path / "checkpoints" / "step-00000001") == (path, 1)


def test_damaged_checkpoints_are_named_and_never_a_new_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_run(tmp_path / "run")
    truncate(path / "checkpoints" / "step-00000002")
    assert prepare(tmp_path, resume=path) == (path, 1)
    assert "step-00000002 is damaged; going by" in caplog.text
    truncate(path / "checkpoints" / "step-00000001")
    for where in (path, path / "checkpoints" / "step-00000001"):
        with pytest.raises(UserError, match=r"model\.safetensors has \d+ bytes, \d+ were written"):
            prepare(tmp_path, resume=where)
    with pytest.raises(UserError, match=r"step-00000002/model\.safetensors has"):
        load_checkpoint(path)


def truncate(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def test_auto_with_a_run_dir(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert prepare(tmp_path, run_dir=path, resume="auto") == (path, None)
    save_checkpoint(path / "checkpoints", step=5, model_tensors={"a": torch.zeros(1)})
    assert prepare(tmp_path, run_dir=path, resume="auto") == (path, 5)


def test_auto_finds_the_newest_unfinished_run_of_the_same_config(tmp_path: Path) -> None:
    make_run(tmp_path / "20260101-000000-aaaa")
    expected = make_run(tmp_path / "20260102-000000-aaaa", state="interrupted")
    make_run(tmp_path / "20260103-000000-aaaa", config={**CONFIG, "seed": 2})
    make_run(tmp_path / "20260104-000000-aaaa", state="finished")
    (make_run(tmp_path / "20260105-000000-aaaa") / "config.yaml").write_text("[")
    (tmp_path / "20260106-000000-aaaa").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert prepare(tmp_path, resume="auto") == (expected, 2)
    with RunDirectory.open(expected):
        assert prepare(tmp_path, resume="auto") == (tmp_path / "20260101-000000-aaaa", 2)


def test_auto_starts_afresh_when_there_is_nothing_to_continue(tmp_path: Path) -> None:
    make_run(tmp_path / "20260104-000000-aaaa", state="finished")
    path, step = prepare(tmp_path, resume="auto")
    assert step is None
    assert path.name != "20260104-000000-aaaa"
    assert find_unfinished(tmp_path / "gone", config_fingerprint(CONFIG)) is None


def test_config_difference() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": {}}, "gone": {"x": None}}
    new = {"a": 1, "b": {"c": [1, 3], "d": {"e": 1}}, "new": 0}
    assert config_difference(old, old) == {}
    assert config_difference(old, new) == {
        "b.c": ([1, 2], [1, 3]),
        "b.d": ({}, "<absent>"),
        "b.d.e": ("<absent>", 1),
        "gone.x": (None, "<absent>"),
        "new": ("<absent>", 0),
    }
