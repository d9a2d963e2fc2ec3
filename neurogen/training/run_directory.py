"""A run directory: everything one run leaves behind, and the lock that keeps it to that run.

runs/20260131-235959-9f3a/
    config.yaml      the resolved configuration
    metrics.jsonl    one row a step                     status.json    state, step, tokens, seconds, reason
    samples/         generated text                     plots/         curves
    checkpoints/     see neurogen.training.checkpoint   lock           held while the run is live
    machine.json     device, versions and commit
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from neurogen.errors import UserError
from neurogen.storage.files import (
    canonical_json,
    decode_floats,
    encode_floats,
    fsync_directory,
    read_json,
    write_atomically,
)
from neurogen.training.checkpoint import list_checkpoints
from neurogen.training.lock import RunLock, is_locked

STATES = ("running", "finished", "interrupted", "failed")
_PLACE_KEYS = ("run_dir", "resume")


def config_fingerprint(config: dict[str, Any], *, ignore: Sequence[str] = _PLACE_KEYS) -> str:
    """Return the SHA-256 of a resolved configuration, less the top-level keys that only say where a run is kept."""
    relevant = {key: value for key, value in config.items() if key not in ignore}
    return hashlib.sha256(canonical_json(encode_floats(relevant))).hexdigest()


class RunDirectory:
    """The paths and small files of one run. Made by `create`, `open` (both lock it) or `view` (read only)."""

    def __init__(self, path: Path, lock: RunLock | None) -> None:
        self.path = path
        self._lock = lock
        self.config_path = path / "config.yaml"
        self.metrics_path = path / "metrics.jsonl"
        self.status_path = path / "status.json"
        self.samples = path / "samples"
        self.plots = path / "plots"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(
        cls, path: str | Path | None = None, *, config: dict[str, Any], root: str | Path = "runs"
    ) -> "RunDirectory":
        """Make and lock a fresh directory with config.yaml and status.json; two calls never return the same one.

        Without a path the name is `root/<date>-<time>-<random suffix>`. Raises UserError for a path that is in use.
        """
        folder = _make_fresh(Path(root)) if path is None else _claim(Path(path))
        run = cls(folder, RunLock(folder / "lock"))
        try:
            if run.config_path.exists():  # another process claimed the same empty folder a moment before us
                raise UserError(f"run directory {folder} is in use; choose another run_dir")
            for child in (run.samples, run.plots, run.checkpoints):
                child.mkdir()
            run.write_config(config)
            run.write_status("running", step=0, tokens=0, seconds=0.0)
            fsync_directory(folder.absolute().parent)
        except OSError as error:
            run.close()
            raise UserError(
                f"cannot write to run directory {folder}: {error.strerror}; choose another run_dir"
            ) from error
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """Lock a run directory to continue it. Raises UserError when it is none, or when its run is live."""
        folder = cls.view(path).path
        return cls(folder, RunLock(folder / "lock"))

    @classmethod
    def view(cls, path: str | Path) -> "RunDirectory":
        """Return a run directory without locking it, for readers. Raises UserError when it is none."""
        folder = Path(path)
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder} is not a run directory (it has no config.yaml); give a folder made by train.py")
        return cls(folder, None)

    @property
    def is_live(self) -> bool:
        """Whether some process holds the lock. A killed run's status still says running, but it is not live."""
        return is_locked(self.path / "lock")

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the resolved configuration as config.yaml, at once or not at all."""
        write_atomically(self.config_path, OmegaConf.to_yaml(OmegaConf.create(config)).encode("utf-8"))

    def read_config(self) -> dict[str, Any]:
        """Return config.yaml as plain containers; nothing in it is interpolated or instantiated. Raises UserError."""
        try:
            config = OmegaConf.to_container(OmegaConf.load(self.config_path), resolve=False)
        except (OSError, YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {self.config_path}: {' '.join(str(error).split())[:200]}") from error
        if not isinstance(config, dict):
            raise UserError(f"{self.config_path} holds no configuration; restore it from the run's checkpoint.json")
        return {str(key): value for key, value in config.items()}

    def write_machine(self, facts: dict[str, str]) -> None:
        """Write machine.json: what the run was last started or continued on."""
        write_atomically(self.path / "machine.json", json.dumps(facts, indent=1).encode("ascii") + b"\n")

    def read_machine(self) -> dict[str, Any]:
        """Return machine.json, or nothing where there is none. Raises UserError when it cannot be read."""
        path = self.path / "machine.json"
        return read_json(path, remedy="delete it") if path.exists() else {}

    def write_status(
        self,
        state: str,
        *,
        step: int,
        tokens: int,
        seconds: float,
        reason: str = "",
        last_checkpoint: str | Path | None = None,
    ) -> None:
        """Replace status.json. `state` is one of STATES; `reason` says why the run ended, in one line."""
        assert state in STATES, state
        last = None if last_checkpoint is None else os.path.relpath(last_checkpoint, self.path)
        status = {
            "state": state,
            "step": int(step),
            "tokens": int(tokens),
            "seconds": float(seconds),
            "reason": reason,
            "last_checkpoint": last,
        }
        write_atomically(self.status_path, json.dumps(encode_floats(status), indent=1).encode("ascii") + b"\n")

    def read_status(self) -> dict[str, Any]:
        """Return status.json. Raises UserError when it cannot be read."""
        return decode_floats(read_json(self.status_path, remedy="resume the run to write it anew"))

    def write_sample(self, step: int, text: str) -> Path:
        """Write generated text to samples/step-<step>.txt (UTF-8; lone surrogates are replaced) and return its path."""
        path = self.samples / f"step-{step:08d}.txt"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text.encode("utf-8", errors="replace"))
        return path

    def rewind(self, step: int) -> list[Path]:
        """Set checkpoints newer than `step` aside, into checkpoints/abandoned-<n>/, and return where they are now.

        Needed when a run goes on from an older checkpoint: the newer ones are no longer its future, yet nobody asked to
        delete them.
        """
        newer = [path for path in list_checkpoints(self.checkpoints) if int(path.name[5:].split(".")[0]) > step]
        if not newer:
            return []
        number = 1
        while (folder := self.checkpoints / f"abandoned-{number}").exists():
            number += 1
        folder.mkdir()
        moved = [path.rename(folder / path.name) for path in newer]
        fsync_directory(folder)
        fsync_directory(self.checkpoints)
        return moved

    def close(self) -> None:
        """Give the lock back; closing twice is fine."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _make_fresh(root: Path) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            # secrets, because drawing from a seeded generator here would change what the run draws.
            folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"cannot make a run directory in {root}: {error.strerror}; choose another run_dir") from error


def _claim(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(child.name != "lock" for child in path.iterdir()):
            raise UserError(
                f"run directory {path} is in use; choose another run_dir, or continue it with resume={path}"
            )
    except OSError as error:
        raise UserError(f"cannot use {path} as run directory: {error.strerror}; choose another run_dir") from error
    return path
