"""How training speeds up over processes: weak scaling (lanes grow with them) and strong scaling (lanes stay the same).

    python scripts/benchmark_scaling.py processes=1,2,4 strategy=ddp,fsdp model=small data.lanes=64 data.window=512

Each case is a run of scripts/train.py on this machine, by processes with the environment that torchrun gives, on
Python's standard library, and its rate is what the run itself logs: tokens a second over all processes, at its median
after the first intervals. efficiency = rate of N processes / (N x rate of one). One process runs without a strategy;
`data.lanes` are its lanes: a process's own in weak scaling, all processes' in strong. Peak memory is the first
process's. On a GPU, one process and several of ddp record their step as a CUDA graph, fsdp does not;
trainer.cuda_graph=false compares like with like.

    processes=1,2            numbers of processes (default 1,2); 1 is always among them
    strategy=ddp             ddp, fsdp, or both
    kinds=weak,strong        or one of them
    steps=60  log_every=5    length of a run, and of an interval; the first `skip=4` intervals are left out
    timeout=600              seconds for a case, then its processes are ended
    budget=0                 seconds for all cases, then no other is begun and the one at work is ended; 0 for any
    ahead=1                  start a case's processes along with the case before, so that their imports are done when it
                             is their turn (default on a GPU; on a CPU it would slow that case down); 0: not
    out=docs/benchmarks/scaling.json
Anything else goes to scripts/train.py as it is: model=..., mode=fused, trainer.dtype=bfloat16, trainer.accumulation=2.
A row is written as soon as its case has ended. Each run and its log stay in a temporary folder only; a case that fails
becomes a row with the end of what it said.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neurogen.benchmark import Row, write_rows
from neurogen.config.compose import compose_config
from neurogen.errors import UserError
from neurogen.machine import machine_facts
from neurogen.training.metrics import read_metrics

TRAIN = Path(__file__).resolve().with_name("train.py")
RATE, PEAK = "throughput/tokens_per_second", "memory/peak_bytes"
DEFAULTS: dict[str, Any] = {
    "processes": "1,2",
    "strategy": "ddp",
    "kinds": "weak,strong",
    "steps": 60,
    "log_every": 5,
    "skip": 4,
    "timeout": 600,
    "budget": 0,
    "ahead": int(torch.cuda.is_available()),
    "out": "docs/benchmarks/scaling.json",
}
CHOICES = {"strategy": ("ddp", "fsdp"), "kinds": ("weak", "strong")}
POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0  # between the end of one process that failed and the end of those that wait for it
# A process imports what takes long, waits for a line that says it is its turn, and becomes the script.
WAITING = """
import runpy, sys
import neurogen.training.run
if sys.stdin.readline():
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Case:
    """One run: `kind` is weak or strong, or alone for one process."""

    kind: str
    strategy: str
    processes: int
    lanes: int


def main(arguments: Sequence[str], *, script: Path = TRAIN) -> int:
    settings, words = dict(DEFAULTS), []
    try:
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if key not in settings or not equals:
                words.append(argument)
            elif isinstance(settings[key], int) and not value.isdigit():
                raise UserError(f"{key}={value}: must be a whole number")
            else:
                settings[key] = int(value) if isinstance(settings[key], int) else value
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
    last = time.monotonic() + settings["budget"] if settings["budget"] else float("inf")
    todo = cases(settings, config.data.lanes)
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(Run(case, settings, words, script)) for case in todo]
        for number, (case, run) in enumerate(zip(todo, runs)):
            if time.monotonic() >= last:
                print(f"budget={settings['budget']}: is spent; {len(todo) - number} cases are not measured", flush=True)
                return
            run.begin()
            for following in runs[number + 1 : number + 2] if settings["ahead"] else ():
                following.start(waiting=True)
            shape: dict[str, int | str] = {"model": _word(words, "model", "nano"), "processes": case.processes}
            shape |= {"lanes": case.lanes, "window": config.data.window, "accumulation": config.trainer.accumulation}
            row: dict[str, Any] = {"suite": "scaling", "op": f"train, {case.kind}", "provider": case.strategy}
            row |= {"shape": shape, "dtype": config.trainer.dtype, "machine": facts}
            try:
                rates, peak = run.finish(min(last, time.monotonic() + settings["timeout"]))
            except UserError as error:
                result = Row(**row, failure=str(error)[-300:])
            else:
                alone = statistics.median(rates) if case.processes == 1 else alone
                result = Row(**row, **figures(rates, case, alone, config.data.window), peak_bytes=peak)
            write_rows(Path(settings["out"]), [result])
            speed = result.failure or "  ".join(f"{key} {value:,.4g}" for key, value in result.extra.items())
            print(
                f"{result.op:14} {case.strategy:5} {case.processes} processes, {case.lanes} lanes: {speed}", flush=True
            )


def cases(settings: dict[str, Any], lanes: int) -> list[Case]:
    """One process first, then the kinds of scaling for each strategy and number. UserError for what cannot be."""
    counts = []
    for word in settings["processes"].split(","):
        if not word.isdigit() or int(word) < 1:
            raise UserError(f"processes={settings['processes']}: must be whole numbers of at least 1")
        counts.append(int(word))
    chosen = {key: settings[key].split(",") for key in CHOICES}
    for key, words in chosen.items():
        for word in words:
            if word not in CHOICES[key]:
                raise UserError(f"{key}={word}: unknown; choose of {', '.join(CHOICES[key])}")
    found = [Case("alone", "none", 1, lanes)]
    for strategy in chosen["strategy"]:
        for count in sorted({*counts} - {1}):
            if lanes % count:
                raise UserError(f"data.lanes={lanes}: must divide by {count} processes")
            found += [
                Case(kind, strategy, count, lanes * count if kind == "weak" else lanes) for kind in chosen["kinds"]
            ]
    return found


class Run:
    """The processes of one case, from their start; as a context, none of them is left at its end.

    The run stops at a step instead of finishing, so that it neither evaluates nor draws samples or pictures.
    """

    def __init__(self, case: Case, settings: dict[str, Any], words: list[str], script: Path) -> None:
        self._skip = settings["skip"]
        self._script = script
        self._num_processes = case.processes
        self._folder = Path(tempfile.mkdtemp(prefix="scaling-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        own = ["data=stdlib", *words, f"data.lanes={case.lanes}", f"run_dir={self._folder}/run", "logger=none"]
        own += [f"trainer.distributed={case.strategy}", f"trainer.max_steps={settings['steps'] + 1}"]
        own += [f"trainer.stop_at_step={settings['steps']}", f"trainer.log_every={settings['log_every']}"]
        own += ["trainer.checkpoint_every=0", "trainer.evaluate_every=0", "trainer.sample_every=0"]
        self._words = own

    def start(self, *, waiting: bool) -> None:
        """Start the processes; `waiting`, they import what they need and go on when they are told to."""
        environment = _environment(self._num_processes)
        for rank in range(self._num_processes):
            if self._num_processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, *(("-c", WAITING) if waiting else ()), str(self._script), *self._words],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # so that it is ended together with whatever it started
                )
            self._processes.append(process)

    def begin(self) -> None:
        """Have the processes begin, started by now."""
        if not self._processes:
            self.start(waiting=False)
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):  # one that has died already says so in its log
                assert process.stdin is not None
                process.stdin.write(b"begin\n")
                process.stdin.flush()

    def finish(self, last: float) -> tuple[list[float], int]:
        """Wait for the end; rates of the intervals that count, and peak bytes.

        Raises UserError, with the end of what the first process to fail said, if one does or `last` (time.monotonic())
        comes before they have ended.
        """
        failed = self._wait(last)
        self._end()
        if failed is not None:
            lines = self._log(failed).read_text(errors="replace").splitlines()
            raise UserError(next((line for line in lines if line.startswith("error")), "\n".join(lines)[-300:]))
        rows = [row for row in read_metrics(self._folder / "run" / "metrics.jsonl") if RATE in row]
        return [float(row[RATE]) for row in rows[self._skip :]], int(rows[-1][PEAK])

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _log(self, rank: int) -> Path:
        return self._folder / f"{rank}.log"

    def _wait(self, last: float) -> int | None:
        """The rank that failed, None if all ended well. Those that wait for one that failed are given a little time to
        notice."""
        failed = None
        while any(process.poll() is None for process in self._processes):
            codes = [process.returncode for process in self._processes]
            if failed is None and any(codes):
                failed = next(rank for rank, code in enumerate(codes) if code)
                last = min(last, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() >= last:
                if failed is None:
                    raise UserError("did not end in time, and was ended")
                return failed
            time.sleep(POLL_SECONDS)
        codes = [process.returncode for process in self._processes]
        return failed if failed is not None else next((rank for rank, code in enumerate(codes) if code), None)

    def _end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):  # whatever it started may be there still
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        self._processes.clear()


def _environment(num_processes: int) -> dict[str, str]:
    """This process's, with this checkout to import from, less what another torchrun may have left; for several
    processes, where they meet; and one thread of a CPU for each, as torchrun has it, and so for one alone."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    paths = [str(TRAIN.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment.setdefault("OMP_NUM_THREADS", "1")
    if num_processes > 1:
        environment |= {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return environment


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


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


def _end_cleanly(number: int, _frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end_cleanly)
    sys.exit(main(sys.argv[1:]))
