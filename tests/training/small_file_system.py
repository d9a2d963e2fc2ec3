"""A file system that can be filled to the end without harm."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest


def mounted_on(folder: Path, *, megabytes: int) -> tuple[str, ...]:
    """A command prefix that runs a program with a small file system of its own mounted on a folder; the program sees
    it, and it is gone with the program. Skips the test where that is not allowed."""
    mount = f"mount -t tmpfs -o size={megabytes}m none {shlex.quote(str(folder))}"
    wrapper = ("unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    return wrapper
