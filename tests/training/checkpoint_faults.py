"""A program the crash tests run: it saves checkpoints and dies, or meets a full disk, where it is told to.

    python checkpoint_faults.py KIND FOLDER [KIND FOLDER]...

    stages FOLDER      kill a child (SIGKILL) at each stage of saving; a report a case
    moments FOLDER N   kill N saving children after a random time each; the same
    limit FOLDER       save into a limit on a file's size, which stays: the last to be named
    fill FOLDER        save until the disk is full

Each report is a line of JSON with its kind. The children are forked from a process that has one thread and torch
imported: a case costs milliseconds, not seconds.
"""

import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from neurogen.training import checkpoint
from neurogen.training.checkpoint import CheckpointNotSaved, save_checkpoint

KEEP_LAST = 2


class TwoFileTokenizer:
    """Saves a file and a nested one, as a tokenizer may."""

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text('{"kind": "bytes"}')
        (directory / "more").mkdir()
        (directory / "more" / "merges.txt").write_text("a b\n")


def save(folder: Path, step: int, mark: int = 0) -> Path:
    """Save a checkpoint whose every number says which step and mark it is of."""
    return save_checkpoint(
        folder,
        step=step,
        model_tensors={"weight": torch.full((64, 65), 1000.0 * mark + step), "mask": torch.ones(3, dtype=torch.bool)},
        optimizer_tensors={"momentum": torch.full((64, 65), -1000.0 * mark - step)},
        state_tensors={"membrane_voltage": torch.full((4, 7), 1000.0 * mark + step, dtype=torch.float64)},
        metadata={"mark": mark, "tokens": 512 * step},
        tokenizer=TwoFileTokenizer(),
        score=10.0 - step,
        keep_last=KEEP_LAST,
    )


def report(kind: str, **facts: object) -> None:
    print(json.dumps({"kind": kind, **facts}), flush=True)  # or a forked child would print it too


def kill_at_every_stage(root: Path) -> None:
    """Two cases a stage: saving step 3 after steps 1 and 2, and saving step 2 anew with another mark."""
    stages: list[str] = []
    checkpoint.reached = stages.append
    save(root / "dry", 1)
    save(root / "dry", 2)
    save(root / "dry", 2, mark=1)
    save(root / "dry", 3)
    for step, mark in ((3, 0), (2, 1)):
        for index, stage in enumerate(dict.fromkeys(stages)):
            folder = root / f"step-{step}-stage-{index}"
            checkpoint.reached = checkpoint._no_fault
            save(folder, 1)
            save(folder, 2)
            child = os.fork()
            if child == 0:
                checkpoint.reached = lambda now, stage=stage: now == stage and os.kill(os.getpid(), signal.SIGKILL)
                save(folder, step, mark)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            report("stages", folder=str(folder), stage=stage, step=step, mark=mark, status=status)


def kill_at_random_moments(root: Path, num_kills: int) -> None:
    """The child writes a byte to a pipe after each save has returned: those are the steps that must not be lost."""
    delays = random.Random(num_kills)
    for kill in range(num_kills):
        folder = root / str(kill)
        receive, acknowledge = os.pipe()
        child = os.fork()
        if child == 0:
            for step in itertools.count(1):
                save(folder, step)
                os.write(acknowledge, b".")
        os.close(acknowledge)
        acknowledged = len(os.read(receive, 1))
        time.sleep(delays.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while count := len(os.read(receive, 4096)):
            acknowledged += count
        os.close(receive)
        report("moments", folder=str(folder), acknowledged=acknowledged)


def save_into_a_limit(folder: Path) -> None:
    """The limit on a file's size makes write() fail half way, in the operating system itself."""
    save(folder, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    try:
        save(folder, 2)
        report("limit", folder=str(folder), error=None)
    except CheckpointNotSaved as error:
        report("limit", folder=str(folder), error=str(error), errno=error.errno)


def save_until_full(folder: Path) -> None:
    """For a small file system of the test's own: every checkpoint is kept until there is no room for one more."""
    for step in itertools.count(1):
        tensors = {"weight": torch.full((100_000,), float(step))}
        try:
            save_checkpoint(folder, step=step, model_tensors=tensors, keep_last=None)
        except CheckpointNotSaved as error:
            newest = checkpoint.load_checkpoint(folder)
            facts = {"weight": newest.model_tensors["weight"].unique().tolist(), "newest": newest.step}
            facts["names"] = sorted(path.name for path in folder.iterdir())
            report("fill", errno=error.errno, failed=step, **facts)
            return


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = iter(sys.argv[1:])
    for kind, folder in zip(words, map(Path, words)):
        checkpoint.reached = checkpoint._no_fault
        if kind == "stages":
            kill_at_every_stage(folder)
        elif kind == "moments":
            kill_at_random_moments(folder, int(next(words)))
        elif kind == "limit":
            save_into_a_limit(folder)
        else:
            save_until_full(folder)
