"""What a sweep found: summary.md, summary.json and summary.png in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neurogen.errors import UserError
from neurogen.storage.files import encode_floats, write_atomically
from neurogen.sweep.jobs import Job
from neurogen.training.metrics import read_metrics

COLUMNS = ("val/bpb", "val/loss", "train/loss", "throughput/tokens_per_second", "memory/peak_bytes")


def job_rows(job: Job) -> list[dict[str, float]]:
    """The job's metrics, [] if it left none that can be read."""
    path = job.run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        return read_metrics(path)
    except UserError:
        return []


def last_value(rows: Sequence[dict[str, float]], name: str) -> float | None:
    """The last row's value that has it, None if none has."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def write_summary(folder: Path, jobs: Sequence[Job], *, metric: str = "val/bpb", direction: str = "minimize") -> Path:
    """Write all three files; return the path of summary.md. Jobs are sorted by `metric`, those without it last."""
    metrics = {job.name: job_rows(job) for job in jobs}
    columns = list(dict.fromkeys((metric, *COLUMNS)))
    entries: list[dict[str, Any]] = []
    for job in jobs:
        values = {name: last_value(metrics[job.name], name) for name in columns}
        entries.append(
            {
                "job": job.name,
                "state": job.state,
                "varied": job.varied,
                "metrics": values,
                "steps": int(metrics[job.name][-1]["step"]) if metrics[job.name] else 0,
                "seconds": round(job.seconds, 3),
                "error": job.error,
                "traceback": job.traceback,
                "overrides": job.overrides,
            }
        )
    sign = 1.0 if direction == "minimize" else -1.0
    entries.sort(key=lambda entry: _rank(entry["metrics"][metric], sign))
    content = {"metric": metric, "direction": direction, "jobs": entries}
    write_atomically(folder / "summary.json", json.dumps(encode_floats(content), indent=1).encode() + b"\n")
    path = folder / "summary.md"
    write_atomically(path, _markdown(folder.name, entries, columns).encode())
    _plot(folder / "summary.png", entries, metrics, metric)
    return path


def _rank(value: float | None, sign: float) -> float:
    return math.inf if value is None or not math.isfinite(value) else sign * value


def _markdown(title: str, entries: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    keys = list(dict.fromkeys(key for entry in entries for key in entry["varied"]))
    shown = [name for name in columns if any(entry["metrics"][name] is not None for entry in entries)]
    head = [*keys, "state", *shown, "steps", "seconds"]
    lines = [f"# {title}", "", _line(head), _line(["---"] * len(head))]
    for entry in entries:
        varied = [entry["varied"].get(key, "") for key in keys]
        numbers = ["" if entry["metrics"][n] is None else f"{entry['metrics'][n]:.5g}" for n in shown]
        lines.append(_line([*varied, entry["state"], *numbers, str(entry["steps"]), f"{entry['seconds']:.1f}"]))
    broken = [entry for entry in entries if entry["error"]]
    for entry in broken:
        lines += ["", f"`{entry['job']}` failed: {entry['error']}"]
        if entry["traceback"] and entry["traceback"] != entry["error"]:
            lines += ["", "```", entry["traceback"], "```"]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _plot(
    path: Path, entries: Sequence[dict[str, Any]], metrics: dict[str, list[dict[str, float]]], metric: str
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, max(3.5, 1.5 + 0.3 * len(entries))), layout="constrained")
    FigureCanvasAgg(figure)
    bars, curves = figure.subplots(1, 2)
    scored = [entry for entry in entries if entry["metrics"][metric] is not None]
    labels = [entry["job"].rpartition("-")[0] or entry["job"] for entry in scored]
    bars.barh(range(len(scored)), [entry["metrics"][metric] for entry in scored])
    bars.set_yticks(range(len(scored)), labels)
    bars.invert_yaxis()
    bars.set_xlabel(metric)
    for entry, label in zip(scored, labels):
        points = [(row["tokens"], row[metric]) for row in metrics[entry["job"]] if metric in row]
        curves.plot(*zip(*points), marker=".", label=label)
    curves.set_xlabel("tokens")
    curves.set_ylabel(metric)
    if 0 < len(scored) <= 20:
        curves.legend(fontsize="small")
    figure.savefig(path, dpi=120)
