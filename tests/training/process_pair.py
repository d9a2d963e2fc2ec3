"""Two processes of a test, with the environment that torchrun gives."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_ports(count: int) -> list[int]:
    """Ports to listen on later: below those the system hands out, which connections made until then could be given."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 32_768), 1000):  # tests seed the other generators
        with contextlib.suppress(OSError), socket.socket() as held:
            held.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError("no free ports")


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
