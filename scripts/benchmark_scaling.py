"""How training speeds up over processes: weak scaling (lanes grow with them) and strong scaling (lanes stay the same).

    python scripts/benchmark_scaling.py processes=1,2,4 strategy=ddp,fsdp model=small data.lanes=64 data.window=512

Each case is scripts/train.py under torchrun on this machine, on Python's standard library, and its rate is what the run
itself logs: tokens a second over all processes, at its median after the first intervals. efficiency = rate of N
processes / (N x rate of one). One process runs without a strategy; `data.lanes` are its lanes: a process's own in weak
scaling, all processes' in strong. Peak memory is the first process's.

    processes=1,2            numbers of processes (default 1,2); 1 is always among them
    strategy=ddp             ddp, fsdp, or both
    steps=60  log_every=5    length of a run, and of an interval; the first `skip=4` intervals are left out
    out=docs/benchmarks/scaling.json
Anything else goes to scripts/train.py as it is: model=..., mode=fused, trainer.dtype=bfloat16, trainer.accumulation=2.
Each run and its log stay in a temporary folder only; a case that fails becomes a row with the end of what it said.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurogen.benchmark import Row, write_rows
from neurogen.config.compose import compose_config
from neurogen.errors import UserError
from neurogen.machine import machine_facts
from neurogen.training.metrics import read_metrics

TRAIN = Path(__file__).resolve().with_name("train.py")
RATE, PEAK = "throughput/tokens_per_second", "memory/peak_bytes"
NUMBERS = ("steps", "log_every", "skip", "timeout")
STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True)
class Case:
    """One run: `kind` is weak or strong, or alone for one process."""

    kind: str
    strategy: str
    processes: int
    lanes: int


def main(arguments: Sequence[str], *, script: Path = TRAIN) -> int:
    settings: dict[str, Any] = {"processes": "1,2", "strategy": "ddp", "steps": 60, "log_every": 5, "skip": 4}
    settings |= {"timeout": 3600, "out": "docs/benchmarks/scaling.json"}
    words = []
    try:
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if key not in settings or not equals:
                words.append(argument)
            elif key in NUMBERS and not value.isdigit():
                raise UserError(f"{key}={value}: must be a whole number")
            else:
                settings[key] = int(value) if key in NUMBERS else value
        if settings["steps"] < settings["log_every"] * (settings["skip"] + 2):
            raise UserError(f"steps={settings['steps']}: must hold at least two intervals after the first, left out")
        run_all(settings, words, script)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_all(settings: dict[str, Any], words: list[str], script: Path) -> None:
    """Run every case and write its row at once, so that what is measured is kept if a later one is interrupted."""
    config = compose_config(["data=stdlib", *words])
    facts = machine_facts()
    alone = 0.0
    for case in cases(settings["processes"], settings["strategy"], config.data.lanes):
        shape: dict[str, int | str] = {"model": _word(words, "model", "nano"), "processes": case.processes}
        shape |= {"lanes": case.lanes, "window": config.data.window, "accumulation": config.trainer.accumulation}
        row: dict[str, Any] = {"suite": "scaling", "op": f"train, {case.kind}", "provider": case.strategy}
        row |= {"shape": shape, "dtype": config.trainer.dtype, "machine": facts}
        try:
            rates, peak = run_case(case, settings, words, script)
        except (UserError, subprocess.TimeoutExpired) as error:
            result = Row(**row, failure=str(error)[-300:])
        else:
            alone = statistics.median(rates) if case.processes == 1 else alone
            result = Row(**row, **figures(rates, case, alone, config.data.window), peak_bytes=peak)
        write_rows(Path(settings["out"]), [result])
        speed = result.failure or "  ".join(f"{key} {value:,.4g}" for key, value in result.extra.items())
        print(f"{result.op:14} {case.strategy:5} {case.processes} processes, {case.lanes} lanes: {speed}", flush=True)


def cases(processes: str, strategies: str, lanes: int) -> list[Case]:
    """One process first, then both kinds of scaling for each strategy and number. UserError for what cannot be."""
    counts = []
    for word in processes.split(","):
        if not word.isdigit() or int(word) < 1:
            raise UserError(f"processes={processes}: must be whole numbers of at least 1")
        counts.append(int(word))
    found = [Case("alone", "none", 1, lanes)]
    for strategy in strategies.split(","):
        if strategy not in STRATEGIES:
            raise UserError(f"strategy={strategy}: unknown; choose of {', '.join(STRATEGIES)}")
        for count in sorted({*counts} - {1}):
            if lanes % count:
                raise UserError(f"data.lanes={lanes}: must divide by {count} processes")
            found += [Case("weak", strategy, count, lanes * count), Case("strong", strategy, count, lanes)]
    return found


def run_case(case: Case, settings: dict[str, Any], words: list[str], script: Path) -> tuple[list[float], int]:
    """Rates of the intervals that count, and peak bytes. Raises UserError with the end of the log if the run fails."""
    command = [sys.executable]
    if case.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}"]
    with tempfile.TemporaryDirectory() as directory:
        own = ["data=stdlib", *words, f"data.lanes={case.lanes}", f"run_dir={directory}/run", "logger=none"]
        own += [f"trainer.distributed={case.strategy}", f"trainer.max_steps={settings['steps']}"]
        own += [f"trainer.log_every={settings['log_every']}", "trainer.checkpoint_every=0", "trainer.evaluate_every=0"]
        own += ["trainer.sample_every=0", "trainer.sample_prompts=['']", "trainer.sample_tokens=1"]
        own += ["trainer.evaluate_tokens=64", "trainer.evaluate_reset=false"]
        done = subprocess.run(
            [*command, str(script), *own], capture_output=True, text=True, timeout=settings["timeout"], check=False
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("error")] or [done.stderr[-300:]]
            raise UserError(lines[-1])
        rows = [row for row in read_metrics(Path(directory) / "run" / "metrics.jsonl") if RATE in row]
    return [float(row[RATE]) for row in rows[settings["skip"] :]], int(rows[-1][PEAK])


def figures(rates: Sequence[float], case: Case, alone: float, window: int) -> dict[str, Any]:
    """A row's figures: seconds a step, and what they mean for all processes and against one."""
    seconds = [case.lanes * window / rate for rate in rates]
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    rate = statistics.median(rates)
    extra = {"tokens_per_second": rate}
    if alone:
        extra["efficiency"] = rate / (case.processes * alone)
    timing = {"median": statistics.median(seconds), "p20": cuts[1], "p80": cuts[7], "num_runs": len(seconds)}
    return timing | {"extra": extra}


def _word(words: Sequence[str], key: str, default: str) -> str:
    found = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    return found[-1] if found else default


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
