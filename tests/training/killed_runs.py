"""A program the crash tests run: whole training runs, killed anywhere and started again until they finish.

    python killed_runs.py FOLDER SEED NAME NUM_KILLS OVERRIDES...

Prints one JSON line: the points at which runs were killed, how often a start found a checkpoint, and how many runs it
took. FOLDER/NAME_whole is the directory of a run that was let alone, FOLDER/NAME_killed0 of one that was killed; one
that gets to its end before NUM_KILLS kills is followed by NAME_killed1, and so on. Children are forked from a process
that has one thread and everything imported: a kill costs a fraction of a second.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which an optimizer imports at its first step, in every child anew

from neurogen.config.compose import compose_config
from neurogen.training import checkpoint, recorder, run
from neurogen.training.metrics import MetricsWriter
from neurogen.training.muon import Muon
from neurogen.training.optimizer import ModelOptimizer
from neurogen.training.trainer import Trainer
from neurogen.training.update import Update

Point = Callable[[str], None]


def watch(point: Point) -> None:
    """Call `point` before and after everything that changes a run or its files, and at every stage of a save."""
    recorder.plot_run = lambda path: []
    checkpoint.reached = lambda stage: point(f"save: {stage}")
    for owner, name in (
        (Update, "backward"),
        (ModelOptimizer, "step"),
        (Muon, "step"),
        (torch.optim.AdamW, "step"),
        (MetricsWriter, "write"),
        (MetricsWriter, "sync"),
        (Trainer, "_look"),
        (recorder.Recorder, "save"),
        (recorder.Recorder, "status"),
    ):
        setattr(owner, name, _watched(getattr(owner, name), f"{owner.__name__}.{name}", point))


def _watched(function: Any, name: str, point: Point) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        point(f"before {name}")
        result = function(*args, **kwargs)
        point(f"after {name}")
        return result

    return call


def train(overrides: list[str], *, die_at: int | None) -> tuple[int, str, int]:
    """Train in a forked child that kills itself at its `die_at`-th point; return its status, that point, and how many
    it passed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        passed = 0

        def point(name: str) -> None:
            nonlocal passed
            passed += 1
            if passed == die_at:
                os.write(write, f"{name}\n{passed}".encode())
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            watch(point)
            code = run.train(compose_config(overrides))
            os.write(write, f"the end\n{passed}".encode())
        finally:
            os._exit(code)
    os.close(write)
    _, status = os.waitpid(child, 0)
    name, _, count = os.read(read, 1000).decode().partition("\n")
    os.close(read)
    return status, name, int(count or 0)


def main() -> None:
    folder, seed, name, num_kills, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    os.chdir(folder)
    draw = random.Random(int(seed))
    status, _, num_points = train([*overrides, f"run_dir={name}_whole"], die_at=None)
    assert status == 0, status
    points: list[str] = []
    starts_resumed = number = 0
    while True:
        folder_name = f"{name}_killed{number}"
        starts_resumed += checkpoint.find_latest(Path(folder_name) / "checkpoints") is not None
        die_at = draw.randrange(1, num_points) if len(points) < int(num_kills) else None
        status, where, _ = train([*overrides, f"run_dir={folder_name}", "resume=auto"], die_at=die_at)
        if os.WIFEXITED(status):
            assert status == 0, status
            number += 1
            if len(points) == int(num_kills):
                break
        else:
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            points.append(where)
    print(json.dumps({"points": points, "resumed": starts_resumed, "runs": number}))


if __name__ == "__main__":
    main()
