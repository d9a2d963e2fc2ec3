"""A program the full-disk tests run: training whose disk is filled before a step and, perhaps, freed before another.

    python full_disk_runs.py FOLDER CASES OVERRIDES...

FOLDER is a small file system of its own, and CASES a JSON object that has for each name [the step to fill it before,
the step to free it before, trainer.on_save_failure]. One case after the other is the run `run` and, when that has ended
and there is room again, the same run resumed. Prints one JSON line of what came of each, since the file system is gone
with this process.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from neurogen.config.compose import compose_config
from neurogen.errors import UserError
from neurogen.training import recorder
from neurogen.training.checkpoint import find_latest, list_checkpoints, load_checkpoint
from neurogen.training.metrics import read_metrics
from neurogen.training.run import train
from neurogen.training.update import Update

BALLAST = Path("ballast")
CHECKPOINTS = Path("run/checkpoints")


def fill() -> None:
    """Take all there is, byte by byte in the end."""
    with open(BALLAST, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def filling(fill_before: int, free_before: int) -> Any:
    """Update.__call__ that fills the disk before one step, once the save under way has ended, and frees it before
    another."""
    call = Update.__call__
    step = 0

    def patched(self: Update, *args: Any) -> Any:
        nonlocal step
        step += 1
        if step == fill_before:
            deadline = time.monotonic() + 60
            while find_latest(CHECKPOINTS) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            fill()
        if step == free_before:
            BALLAST.unlink()
        return call(self, *args)

    return patched


def run(overrides: list[str]) -> dict[str, Any]:
    """Train, and tell how it ended and what is there."""
    try:
        outcome: Any = train(compose_config(overrides))
    except UserError as error:
        outcome = str(error)
    loaded = load_checkpoint("run")
    digest = {name: float(tensor.double().abs().sum()) for name, tensor in loaded.model_tensors.load().items()}
    return {
        "outcome": outcome,
        "checkpoints": [path.name for path in list_checkpoints(CHECKPOINTS)],
        "leftovers": sorted(path.name for path in CHECKPOINTS.iterdir()),
        "rows": read_metrics("run/metrics.jsonl"),
        "weights": digest,
    }


def run_twice(overrides: list[str], fill_before: int, free_before: int) -> dict[str, Any]:
    """What came of the run, of the same run resumed, and what both said."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        call, Update.__call__ = Update.__call__, filling(fill_before, free_before)  # type: ignore[method-assign]
        first = run([*overrides, "run_dir=run"])
        BALLAST.unlink(missing_ok=True)
        Update.__call__ = call  # type: ignore[method-assign]
        resumed = run([*overrides, "resume=run"])
    shutil.rmtree("run")
    return {"first": first, "resumed": resumed, "said": said.getvalue()}


def main() -> None:
    folder, cases, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    os.chdir(folder)
    recorder.plot_run = lambda path: []
    Path("notes.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(99)))
    reports = {}
    for name, (fill_before, free_before, policy) in json.loads(cases).items():
        words = [*overrides, f"trainer.on_save_failure={policy}"]
        reports[name] = run_twice(words, fill_before, free_before)
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
