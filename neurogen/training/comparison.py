"""Several runs side by side: a Markdown table and curves, from their metrics.jsonl and resolved configurations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from neurogen.errors import UserError
from neurogen.training.metrics import Row, read_metrics
from neurogen.training.plots import _COLORS, curve, smooth
from neurogen.training.run_directory import RunDirectory

# Where a run is kept, how far it got and which of several seeds it had: the same experiment otherwise.
APART_KEYS = ("run_dir", "resume", "seed", "logger")
METRICS = {
    "val/bpb": "bits per byte",
    "val/loss": "loss",
    "val_reset/bpb": "reset bits per byte",
    "throughput/tokens_per_second": "tokens/s",
}


@dataclass(frozen=True)
class Run:
    """One run: its directory's name, its configuration as flat keys, and its rows."""

    name: str
    config: dict[str, Any]
    rows: list[Row]


def read_run(path: str | Path) -> Run:
    """Read a run directory. Raises UserError if it is none, or has no rows."""
    directory = RunDirectory.view(path)
    rows = read_metrics(directory.metrics_path)
    if not rows:
        raise UserError(f"{directory.metrics_path} has no rows yet; compare runs that have logged something")
    return Run(directory.path.resolve().name, _flat(directory.read_config()), rows)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, together, under the settings that tell the groups apart."""
    configs = [{key: value for key, value in run.config.items() if key.split(".")[0] not in APART_KEYS} for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    differing = [key for key in keys if len({repr(config.get(key, _MISSING)) for config in configs}) > 1]
    # What only one kind of model or optimiser has says no more than its name.
    named = [key for key in differing if all(key in config for config in configs)] or differing
    groups: dict[str, list[Run]] = {}
    for run, config in zip(runs, configs):
        identity = tuple(repr(config.get(key, _MISSING)) for key in differing)
        label = ", ".join(f"{key.removesuffix('.name')}={config[key]}" for key in named if key in config)
        label = label or run.name
        same = next((name for name, members in groups.items() if _identity(members[0], differing) == identity), None)
        if same is None:
            same = label
            if label in groups:  # two of one kind, told apart by what only that kind has
                other = groups[label][0].config
                apart = [key for key in differing if key in config and config[key] != other.get(key, _MISSING)]
                same = ", ".join([label, *(f"{key}={config[key]}" for key in apart)])
        groups.setdefault(same, []).append(run)
    return groups


_MISSING = "(not set)"


def _identity(run: Run, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(repr(run.config.get(key, _MISSING)) for key in keys)


def last_value(run: Run, name: str) -> float | None:
    """The metric in the last row that has it, or None."""
    return next((float(row[name]) for row in reversed(run.rows) if name in row), None)


def comparison_table(runs: Sequence[Run]) -> str:
    """A Markdown table, a row an experiment: mean and, of several seeds, the sample standard deviation of each metric's
    last value; best by the first metric first."""
    shown = {key: title for key, title in METRICS.items() if any(last_value(run, key) is not None for run in runs)}
    lines = [
        f"| run | seeds | steps | seconds | {' | '.join(shown.values())} |",
        f"|---|---|---|---|{'---|' * len(shown)}",
    ]
    ranked = []
    for label, members in group_runs(runs).items():
        steps = _spread([float(run.rows[-1]["step"]) for run in members], digits=0)
        seconds = _spread([float(run.rows[-1]["seconds"]) for run in members], digits=1)
        cells = []
        for key in shown:
            values = [value for run in members if (value := last_value(run, key)) is not None]
            cells.append(_spread(values, digits=0 if key.startswith("throughput/") else 4))
        first = [value for run in members for key in list(shown)[:1] if (value := last_value(run, key)) is not None]
        rank = statistics.fmean(first) if first else math.inf
        ranked.append(
            (
                math.inf if math.isnan(rank) else rank,
                f"| {label} | {len(members)} | {steps} | {seconds} | {' | '.join(cells)} |",
            )
        )
    return "\n".join([*lines, *(line for _, line in sorted(ranked, key=lambda each: each[0]))]) + "\n"


def _spread(values: Sequence[float], *, digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def plot_comparison(runs: Sequence[Run], path: Path) -> Path:
    """Draw training loss by step and by second, and validation bits per byte by second; one colour an experiment."""
    figure = Figure(figsize=(15, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("train/loss", "step"), ("train/loss", "seconds"), ("val/bpb", "seconds"))
    for axes, (name, along) in zip(figure.subplots(1, 3), panels):
        for index, (label, members) in enumerate(group_runs(runs).items()):
            for number, run in enumerate(members):
                _, values = curve(run.rows, name)
                xs = [float(row[along]) for row in run.rows if name in row]
                if len(values) >= 50:
                    values = smooth(values, span=max(1.0, len(values) * 0.02))
                axes.plot(
                    xs,
                    values,
                    color=_COLORS[index % len(_COLORS)],
                    linestyle=("-", "--", ":")[index // len(_COLORS) % 3],
                    marker="o" if name == "val/bpb" else None,
                    markersize=3,
                    linewidth=1.4,
                    label=label if number == 0 else None,
                )
        axes.set_xlabel(along)
        axes.set_ylabel({"train/loss": "training loss (nats per token)", "val/bpb": "validation bits per byte"}[name])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
