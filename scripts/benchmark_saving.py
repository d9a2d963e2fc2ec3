"""What saving checkpoints costs training: the time of every step, with and without a save each `every` steps.

    python scripts/benchmark_saving.py [model=nano,small] [steps=40] [every=10] [repeats=3] [device=auto]
                                       [lanes=8] [window=32] [out=docs/benchmarks/saving.json]

Runs of scripts/train.py's own loop on Python's standard library, those that save and those that do not taking turns. A
step's time is from its beginning to the next one's, by the wall clock, so it holds whatever saving makes it wait: the
copy of all tensors, and a save before it that is still being written. Rows: steps of a run that never saves, and of one
that does, those that save (`saving`), those during which a save is written beside them (`beside`: the two after), and
the rest. `extra` has the longest step and, of those that save, `wait_seconds`, how much longer they are than a step
that never saves, and `seconds_a_save`, the same with the two after. On a machine without a core to spare the thread
that writes takes its time from the steps beside it.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from neurogen.benchmark import Row, write_rows
from neurogen.config.compose import compose_config
from neurogen.errors import UserError
from neurogen.machine import machine_facts
from neurogen.training.checkpoint import find_latest
from neurogen.training.run import train
from neurogen.training.update import Update

WARM_UP = 3
NUM_BESIDE = 2
NUMBERS = ("steps", "every", "repeats", "lanes", "window")


def main(arguments: list[str]) -> int:
    settings: dict[str, Any] = {"model": "nano,small", "steps": 40, "every": 10, "repeats": 3, "lanes": 8, "window": 32}
    settings |= {"device": "auto", "out": "docs/benchmarks/saving.json"}
    try:
        for argument in arguments:
            key, _, value = argument.partition("=")
            if key not in settings or (key in NUMBERS and not value.isdigit()):
                raise UserError(f"{argument!r} is no setting here; there are {', '.join(settings)}")
            settings[key] = int(value) if key in NUMBERS else value
        if settings["steps"] < WARM_UP + settings["every"]:
            raise UserError(
                f"steps={settings['steps']}: must be at least {WARM_UP} more than every={settings['every']}"
            )
        for model in settings["model"].split(","):
            rows = measure(model, settings)
            write_rows(Path(settings["out"]), rows)
            for row in rows:
                cost = "  ".join(f"{key} {value:.4g}" for key, value in row.extra.items())
                print(f"{model:8} {row.provider:28} {row.median * 1e3:9.2f} ms  {row.num_runs:4} steps  {cost}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(model: str, settings: dict[str, Any]) -> list[Row]:
    """The rows of one model."""
    every = settings["every"]
    times: dict[int, list[list[float]]] = {0: [], every: []}
    with tempfile.TemporaryDirectory() as directory:
        for repeat in range(settings["repeats"]):
            for interval in times:
                run_dir = Path(directory) / f"{repeat}-{interval}"
                times[interval].append(step_times(model, settings, run_dir, interval))
        size = sum(path.stat().st_size for path in (find_latest(run_dir / "checkpoints") or run_dir).iterdir())
    groups: dict[str, list[float]] = {"never saves": [t for run in times[0] for t in run]}
    groups |= {f"each {every}: {kind}": [] for kind in ("saving", "beside", "rest")}
    for run in times[every]:
        for step, seconds in enumerate(run, start=WARM_UP + 1):
            since = step % every
            kind = "saving" if since == 0 else "beside" if since <= NUM_BESIDE else "rest"
            groups[f"each {every}: {kind}"].append(seconds)
    facts = machine_facts()
    medians = {provider: statistics.median(values) for provider, values in groups.items() if values}
    shape: dict[str, int | str] = {"model": model, "lanes": settings["lanes"], "window": settings["window"]}
    shape |= {"every": every, "checkpoint_bytes": size}
    rows = []
    for provider, values in groups.items():
        if len(values) < 2:
            continue
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        extra = {"max": max(values)}
        if provider.endswith("saving"):
            extra["wait_seconds"] = medians[provider] - medians["never saves"]
            slower = medians[f"each {every}: beside"] - medians["never saves"]
            extra["seconds_a_save"] = extra["wait_seconds"] + NUM_BESIDE * slower
        rows.append(
            Row("saving", "train step", provider, shape, "float32", medians[provider], cuts[1], cuts[7],
                len(values), extra=extra, machine=facts)
        )  # fmt: skip
    return rows


def step_times(model: str, settings: dict[str, Any], run_dir: Path, every: int) -> list[float]:
    """Seconds from the beginning of each step to the next one's, but for the first and the last."""
    call, began = Update.__call__, []

    def noted(self: Update, *args: Any) -> Any:
        began.append(time.perf_counter())
        return call(self, *args)

    words = [f"model={model}", "data=stdlib", f"data.lanes={settings['lanes']}", f"data.window={settings['window']}"]
    words += [f"trainer.max_steps={settings['steps']}", f"trainer.checkpoint_every={every}", "trainer.evaluate_every=0"]
    words += ["trainer.sample_every=0", "trainer.sample_prompts=['']", "trainer.sample_tokens=1", "logger=none"]
    words += ["trainer.evaluate_tokens=64", "trainer.evaluate_reset=false", f"trainer.device={settings['device']}"]
    words += ["trainer.log_every=1", f"run_dir={run_dir}", "trainer.dtype=float32", "trainer.health_plots=false"]
    Update.__call__ = noted  # type: ignore[method-assign]
    try:
        train(compose_config(words))
    finally:
        Update.__call__ = call  # type: ignore[method-assign]
    return [after - before for before, after in itertools.pairwise(began)][WARM_UP:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
