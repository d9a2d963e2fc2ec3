import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from neurogen.errors import UserError
from neurogen.storage.files import read_json, write_atomically
from neurogen.training.checkpoint import save_checkpoint
from neurogen.training.run_directory import RunDirectory, config_fingerprint

CONFIG = {"model": {"embedding_dim": 64, "spike": "graded"}, "optimizer": {"lr": 1e-05}, "seed": 3, "tags": ["a", None]}

HOLDER = """
import sys, time
from neurogen.training.run_directory import RunDirectory
run = RunDirectory.create(sys.argv[1], config={})
print(run.path, flush=True)
time.sleep(60)
"""


FORKS = """
import os, sys
from neurogen.training.run_directory import RunDirectory
children = [os.fork() for _ in range(2)]  # four processes
for _ in range(25):
    os.write(1, f"{RunDirectory.create(config={}, root=sys.argv[1]).path}\\n".encode())
for child in filter(None, children):
    os.waitpid(child, 0)
os._exit(0)  # or each would take torch down by itself
"""

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def test_a_fresh_run_has_everything(tmp_path: Path) -> None:
    with RunDirectory.create(config=CONFIG, root=tmp_path / "runs") as run:
        assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run.path.name)
        assert run.path.parent == tmp_path / "runs"
        assert sorted(path.name for path in run.path.iterdir()) == [
            "checkpoints",
            "config.yaml",
            "lock",
            "plots",
            "samples",
            "status.json",
        ]
        assert run.read_config() == CONFIG
        assert run.read_status()["state"] == "running"


def test_runs_of_the_same_second_never_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the random suffixes collide, mkdir lets one process only have a name."""
    suffixes = iter(["aaaa"] * 5 + ["bbbb"] * 5 + ["cccc"] * 5)
    monkeypatch.setattr("secrets.token_hex", lambda _: next(suffixes))
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    paths = [RunDirectory.create(config={}, root=tmp_path).path for _ in range(3)]
    assert [path.name[-4:] for path in paths] == ["aaaa", "bbbb", "cccc"]


def test_processes_that_start_together_never_share_a_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKS, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=ENVIRONMENT)
    paths = done.stdout.splitlines()
    assert len(set(paths)) == len(paths) == 100


def test_a_named_directory_is_used_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new/below", "empty"):
        RunDirectory.create(tmp_path / name, config={}).close()
        with pytest.raises(UserError, match="is in use; choose another run_dir"):
            RunDirectory.create(tmp_path / name, config={})
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot use"):
        RunDirectory.create(tmp_path / "file", config={})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is in use"):
        RunDirectory.create(tmp_path / "mine", config={})
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_run_live_in_this_process_is_refused(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", config={}) as run:
        assert run.is_live
        with pytest.raises(UserError, match="live in this process"):
            RunDirectory.open(tmp_path / "run")
        assert RunDirectory.view(tmp_path / "run").is_live
    run.close()
    assert not run.is_live
    RunDirectory.open(tmp_path / "run").close()


def test_a_run_live_in_another_process_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout.readline()
        assert RunDirectory.view(tmp_path / "run").is_live
        with pytest.raises(UserError, match=f"live in process {process.pid} on") as caught:
            RunDirectory.open(tmp_path / "run")
        assert "\n" not in str(caught.value)
        # Neither the question nor the refusal may have loosened the lock.
        assert RunDirectory.view(tmp_path / "run").is_live
        os.kill(process.pid, signal.SIGSTOP)  # and a stopped process is a live one
        time.sleep(0.05)
        with pytest.raises(UserError, match="is live"):
            RunDirectory.open(tmp_path / "run")
    finally:
        process.kill()
        process.communicate()
    # The lock file still names the dead process; the status still says running.
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == process.pid
    run = RunDirectory.open(tmp_path / "run")
    assert run.read_status()["state"] == "running"
    run.close()


def test_a_lock_file_with_nonsense_is_no_lock(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", config={}).close()
    for content in ("", "x" * 9999, '{"pid": 1, "host": "elsewhere"}'):
        (tmp_path / "run" / "lock").write_text(content)
        RunDirectory.open(tmp_path / "run").close()


def test_only_run_directories_are_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        for way in (RunDirectory.open, RunDirectory.view):
            with pytest.raises(UserError, match="not a run directory"):
                way(path)
    assert list(tmp_path.iterdir()) == []


def test_status(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", config={}) as run:
        run.write_status(
            "failed",
            step=7,
            tokens=70,
            seconds=float("inf"),
            reason="disk",
            last_checkpoint=run.checkpoints / "step-00000005",
        )
        assert run.read_status() == {
            "state": "failed",
            "step": 7,
            "tokens": 70,
            "seconds": float("inf"),
            "reason": "disk",
            "last_checkpoint": "checkpoints/step-00000005",
        }
        with pytest.raises(AssertionError):
            run.write_status("happy", step=7, tokens=70, seconds=1.0)
        run.status_path.write_text("{")
        with pytest.raises(UserError, match=r"status\.json"):
            run.read_status()


def test_a_config_is_data_and_nothing_else(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", config={}) as run:
        marker = tmp_path / "ran"
        for text, problem in {
            f"a: !!python/object/apply:os.mkdir ['{marker}']": "cannot read",
            "- 1": "no configuration",
            "a: [": "cannot read",
            "": None,
        }.items():
            run.config_path.write_text(text)
            if problem is None:
                assert run.read_config() == {}
            else:
                with pytest.raises(UserError, match=problem) as caught:
                    run.read_config()
                assert "\n" not in str(caught.value)
        run.config_path.write_text("a: ${oc.env:HOME}\n_target_: os.mkdir\n")
        assert run.read_config() == {"a": "${oc.env:HOME}", "_target_": "os.mkdir"}
        assert not marker.exists()


def test_samples(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", config={}) as run:
        assert run.write_sample(12, "größe\n\ud800").read_bytes() == "größe\n?".encode()
        assert [path.name for path in run.samples.iterdir()] == ["step-00000012.txt"]


def test_rewinding_sets_newer_checkpoints_aside(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", config={}) as run:
        for step in (1, 2, 3):
            save_checkpoint(run.checkpoints, step=step, model_tensors={"a": torch.zeros(1)})
        assert run.rewind(3) == []
        assert [path.name for path in run.rewind(1)] == ["step-00000002", "step-00000003"]
        save_checkpoint(run.checkpoints, step=2, model_tensors={"a": torch.ones(1)})
        run.rewind(1)
        assert sorted(path.relative_to(run.checkpoints).as_posix() for path in run.checkpoints.glob("*/*-0*")) == [
            "abandoned-1/step-00000002",
            "abandoned-1/step-00000003",
            "abandoned-2/step-00000002",
        ]


def test_fingerprints() -> None:
    assert config_fingerprint(CONFIG) == config_fingerprint(
        {**dict(reversed(CONFIG.items())), "run_dir": "x", "resume": "auto"}
    )
    assert config_fingerprint(CONFIG) != config_fingerprint({**CONFIG, "seed": 4})
    assert config_fingerprint({"a": {"run_dir": 1}}) != config_fingerprint({"a": {"run_dir": 2}})
    assert config_fingerprint({"a": float("inf")}) != config_fingerprint({"a": float("-inf")})


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_atomically(path, b'{"a": 1}')

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b'{"a": 2}')
    assert read_json(path, remedy="") == {"a": 1}
    assert [child.name for child in tmp_path.iterdir()] == ["status.json"]
