"""A lock on a run directory that is gone the moment its holder dies, however it dies.

It is a POSIX record lock on a small file. The system drops it with the process, forked workers do not inherit it, and
it works across machines on a network file system; so a file left behind by a killed run means nothing, only the lock
does.
"""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from neurogen.errors import UserError

# A process holds record locks as a whole and loses them when it closes any handle of the file, so this process must
# remember its own and never open such a file a second time.
_held_here: set[str] = set()


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(holder['pid'])} on {str(holder['host'])[:64]!r}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise UserError(f"cannot lock {path}: {error.strerror}; put the run on a file system that has locks") from error


class RunLock:
    """Hold `path` from construction to `release`. Raises UserError naming the holder when another run has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        key = os.path.realpath(path)
        if key in _held_here:
            raise UserError(f"run {path.parent} is live in this process; wait for it to end")
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try_lock(self._descriptor, path):
                holder = _read_holder(self._descriptor)
                raise UserError(f"run {path.parent} is live in {holder}; wait for it to end or stop it first")
            os.ftruncate(self._descriptor, 0)
            content = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode("ascii")
            os.pwrite(self._descriptor, content, 0)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._key = key
        _held_here.add(key)

    def release(self) -> None:
        """Give the lock back; twice is fine. The file stays: deleting it would race with a run that opens it."""
        if self._key in _held_here and self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1
            _held_here.discard(self._key)


def is_locked(path: Path) -> bool:
    """Whether a living process, this one included, holds the lock."""
    if os.path.realpath(path) in _held_here:
        return True
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(descriptor, path)
    finally:
        os.close(descriptor)
