"""Two processes of a test, with the environment that torchrun gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def run_pair(script: Path, *arguments: str, environment: Mapping[str, str], timeout: float = 200) -> list[str]:
    """Run a script as both ranks to their end; what both said. Raises AssertionError if one failed.

    Arguments:
        environment: what is added to this process's, such as MASTER_PORT.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    own |= environment
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**own, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return said
