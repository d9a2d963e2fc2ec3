"""What a build of a corpus had done when it was stopped, so that the next one carries on.

A build works in `tmp-<host>-<pid>-...` of the cache. One that streams from afar notes in `progress.json` how far both
streams are known to be on disk; stopped, its directory becomes `partial-<key>`, which one later build makes its own
again. All of it is by renaming: no two builds ever write to one directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from neurogen.storage.files import write_atomically

PROGRESS = "progress.json"


def start_build(cache: Path, key: str, *, carry_on: bool) -> Path:
    """A directory of this process alone in `cache`: with `carry_on`, what an earlier build of `key` left, if any."""
    remove_stale(cache)
    directory = Path(tempfile.mkdtemp(prefix=f"tmp-{socket.gethostname()}-{os.getpid()}-", dir=cache))
    if carry_on:
        with contextlib.suppress(FileNotFoundError):  # nothing was left, or another process was first
            os.rename(_partial(cache, key), directory)
    return directory


def read_progress(directory: Path) -> dict[str, Any] | None:
    """What `write_progress` noted last; None for a build that begins."""
    try:
        return json.loads((directory / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_progress(directory: Path, key: str, content: dict[str, Any]) -> None:
    """Note how far a build of `key` is. What it tells of has to be synced by now."""
    write_atomically(directory / PROGRESS, json.dumps({"key": key, **content}).encode())


def keep(directory: Path) -> bool:
    """Leave a stopped build for a later one (True); remove it where nothing was noted, or another is kept (False)."""
    if (progress := read_progress(directory)) is not None:
        with contextlib.suppress(OSError, KeyError):
            os.rename(directory, _partial(directory.parent, progress["key"]))
            return True
    shutil.rmtree(directory, ignore_errors=True)
    return False


def remove_stale(cache: Path) -> None:
    """Clear up after killed processes of this machine, keeping what can be carried on."""
    prefix = f"tmp-{socket.gethostname()}-"
    for path in cache.glob(f"{prefix}*"):
        pid = path.name[len(prefix) :].split("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            keep(path)


def _partial(cache: Path, key: str) -> Path:
    return cache / f"partial-{key}"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
