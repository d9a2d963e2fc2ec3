"""Time several ways of doing one thing, interleaved, and keep the figures.

A contender is prepared, checked against a float64 reference where it computes the same function, warmed up, and
then takes turns with the others, so that a drift of the machine touches all alike. One that cannot run becomes a
row with its error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from neurogen.machine import machine_facts
from neurogen.training.graph import capture, end_failed_capture

FLUSH_BYTES = 256 << 20  # several times any L2 cache


@dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    Arguments:
        provider: its name in the tables.
        prepare: from the device to a function that does the work once; raises where it cannot run.
        error: from the device to norm(out - reference)/norm(reference) on the same shapes, or None where the contender
            computes another function (a peer's nearest equivalent).
        limit: the largest error with which its time is reported.
        extra: derived figures from its median time in seconds, in place of the comparison's.
        recordable: whether its work may be recorded as a CUDA graph where the comparison asks for that.
    """

    provider: str
    prepare: Callable[[torch.device], Callable[[], Any]]
    error: Callable[[torch.device], float] | None = None
    limit: float = 2e-2
    extra: Callable[[float], dict[str, float]] | None = None
    recordable: bool = True


@dataclass(frozen=True)
class Row:
    """One measurement: seconds, and bytes of memory above what was there before; `failure` says why there is none.
    `recorded` work was replayed as a CUDA graph, so that the host's launches are not in its time."""

    suite: str
    op: str
    provider: str
    shape: dict[str, int | str]
    dtype: str
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    num_runs: int = 0
    peak_bytes: int | None = None
    error: float | None = None
    failure: str | None = None
    recorded: bool = False
    extra: dict[str, float] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)


def compare(
    suite: str,
    op: str,
    contenders: Sequence[Contender],
    *,
    shape: dict[str, int | str],
    dtype: str,
    device: torch.device,
    seconds: float = 1.0,
    min_rounds: int = 10,
    extra: Callable[[float], dict[str, float]] | None = None,
    cold: bool = True,
    record: bool = False,
) -> list[Row]:
    """Check, then time all contenders in turns.

    Arguments:
        seconds: of timing for each contender, roughly.
        min_rounds: turns each gets at least, unless they would take long.
        extra: derived figures from a median time in seconds, such as TFLOP/s.
        cold: whether the GPU's L2 cache is flushed before a call; if not, the call before it is the same one, untimed.
        record: whether work is recorded as a CUDA graph where it can be, so that kernels are compared and not how long
            a host takes to launch them.

    Returns:
        A row a contender, failures included, in the order given.
    """
    machine = machine_facts()
    rows: dict[str, Row] = {}
    ready: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float | None] = {}
    peaks: dict[str, int | None] = {}
    recorded: set[str] = set()

    def fail(provider: str, why: str) -> None:
        rows[provider] = Row(suite, op, provider, shape, dtype, failure=why, machine=machine)

    for contender in contenders:
        name = contender.provider
        # Whatever a peer raises is its result: the others are still to be measured.
        try:
            errors[name] = None if contender.error is None else contender.error(device)
            error = errors[name]
            if error is not None and not error <= contender.limit:
                fail(name, f"wrong: relative error {error:.1e}, limit {contender.limit:.0e}")
                continue
            work = contender.prepare(device)
            work()  # compiles
            peaks[name] = _peak_bytes(work, device)
            ready[name] = work
            if record and contender.recordable and device.type == "cuda":
                replay = _recorded(work, device)
                if replay is not None:
                    ready[name] = replay
                    recorded.add(name)
        except Exception as error:
            fail(name, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}")

    times: dict[str, list[float]] = {name: [] for name in ready}
    if ready:
        once = {name: _time(work, device, cold=cold) for name, work in ready.items()}
        num_rounds = {name: _num_rounds(each, seconds, min_rounds) for name, each in once.items()}
        for turn in range(max(num_rounds.values())):
            for name, work in ready.items():
                if turn < num_rounds[name]:
                    times[name].append(_time(work, device, cold=cold))
    figures = {contender.provider: contender.extra or extra for contender in contenders}
    for name, measured in times.items():
        derive = figures[name]
        p20, median, p80 = (_quantile(measured, q) for q in (0.2, 0.5, 0.8))
        rows[name] = Row(
            suite,
            op,
            name,
            shape,
            dtype,
            median=median,
            p20=p20,
            p80=p80,
            num_runs=len(measured),
            peak_bytes=peaks[name],
            error=errors[name],
            recorded=name in recorded,
            extra={} if derive is None else derive(median),
            machine=machine,
        )
    return [rows[contender.provider] for contender in contenders]


def _num_rounds(once: float, seconds: float, min_rounds: int) -> int:
    """Turns of a contender that takes so long; one that would hold up all others for long gets three."""
    if once * min_rounds > max(10 * seconds, 1.0):
        return 3
    return min(max(min_rounds, int(seconds / max(once, 1e-9))), 1000)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a result file; an older row of the same suite, op, provider, shape, type and device gives way."""
    kept: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        shape = tuple(sorted(row["shape"].items()))
        return row["suite"], row["op"], row["provider"], shape, row["dtype"], row["machine"].get("device")

    new = [asdict(row) for row in rows]
    replaced = {key(row) for row in new}
    kept = [row for row in kept if key(row) not in replaced] + new
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(kept, indent=1) + "\n")
    temporary.replace(path)


def _quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def _time(work: Callable[[], Any], device: torch.device, *, cold: bool) -> float:
    """Seconds of one call."""
    if not cold:
        work()
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    if cold:
        _flush(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


_scratch: dict[torch.device, torch.Tensor] = {}


def _flush(device: torch.device) -> None:
    if device not in _scratch:
        _scratch[device] = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    _scratch[device].zero_()


def _recorded(work: Callable[[], Any], device: torch.device) -> Callable[[], None] | None:
    """The work as a CUDA graph, or None if it cannot be one (it waits for the device, or uses streams of its own)."""
    try:
        replay = capture(work, device)
        replay()
        torch.cuda.synchronize(device)
    except RuntimeError:
        end_failed_capture(device)
        return None
    return replay


def _peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
