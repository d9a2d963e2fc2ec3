"""Curves of a run, drawn from metrics.jsonl alone.

python -m neurogen.training.plots RUN_DIR
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from neurogen.errors import UserError
from neurogen.training.metrics import Row, read_metrics
from neurogen.training.run_directory import RunDirectory

_TRAIN_COLOR = "#9ecae1"
_SMOOTH_COLOR = "#08519c"
_VALIDATION_COLOR = "#d94801"
# Told apart by people who do not see all colours (Okabe and Ito's palette).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SMOOTHING_SHARE = 0.01

Curve = tuple[list[float], list[float]]


def curve(rows: Sequence[Row], name: str) -> Curve:
    """Return (steps, values) of the rows that have a metric; a value that is not finite is NaN, a gap in the line."""
    points = [(float(row["step"]), float(row[name])) for row in rows if name in row]
    return [x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points]


def _trailing_average(values: Sequence[float], span: float) -> list[float]:
    keep = math.exp(-1.0 / span)
    total = weight = 0.0
    averages = []
    for value in values:
        if math.isfinite(value):
            total = keep * total + (1.0 - keep) * value
            weight = keep * weight + (1.0 - keep)
        averages.append(total / weight if math.isfinite(value) else math.nan)
    return averages


def smooth(values: Sequence[float], *, span: float) -> list[float]:
    """Return a moving average that does not lag: the mean of an exponential one forwards and one backwards.

    `span` (positive) is the time constant in points. Values that are not finite are gaps: they come out as NaN and
    leave the average as it was.
    """
    forwards = _trailing_average(values, span)
    backwards = _trailing_average(values[::-1], span)[::-1]
    return [(left + right) / 2.0 for left, right in zip(forwards, backwards, strict=True)]


def _draw_noisy(axes: Axes, points: Curve, label: str) -> None:
    """Draw every value lightly and their moving average strongly."""
    steps, values = points
    if len(steps) < 50:
        axes.plot(steps, values, color=_SMOOTH_COLOR, marker=".", linewidth=1.5, label=label)
        return
    axes.plot(steps, values, color=_TRAIN_COLOR, linewidth=0.8)
    smoothed = smooth(values, span=len(values) * _SMOOTHING_SHARE)
    axes.plot(steps, smoothed, color=_SMOOTH_COLOR, linewidth=1.8, label=f"{label} (moving average)")


def _draw_sparse(axes: Axes, points: Curve, label: str, color: str) -> None:
    axes.plot(*points, color=color, marker="o", markersize=3.5, linewidth=1.8, label=label)


def _mark_last(axes: Axes, points: Curve, color: str, unit: str) -> None:
    """Write the last value beside its point: the number most readers look for."""
    finite = [(x, y) for x, y in zip(*points, strict=True) if math.isfinite(y)]
    if finite:
        axes.annotate(
            f"{finite[-1][1]:.4g}{unit}",
            finite[-1],
            xytext=(5, 0),
            textcoords="offset points",
            color=color,
            va="center",
        )


def _limit_to_bulk(axes: Axes, curves: Sequence[Curve]) -> None:
    """Keep the first steps' height and single spikes from flattening the rest; only the top is ever cut off."""
    values = sorted(value for _, ys in curves for value in ys if math.isfinite(value))
    if len(values) < 50:
        return
    low, high = values[0], values[int(0.98 * (len(values) - 1))]
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.10 * (high - low))


def _draw_loss(axes: Axes, rows: Sequence[Row]) -> bool:
    train, validation = curve(rows, "train/loss"), curve(rows, "val/loss")
    if not train[0] and not validation[0]:
        return False
    if train[0]:
        _draw_noisy(axes, train, "training")
    if validation[0]:
        _draw_sparse(axes, validation, "validation", _VALIDATION_COLOR)
        _mark_last(axes, validation, _VALIDATION_COLOR, "")
    _limit_to_bulk(axes, [train, validation])
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    return True


def _draw_bits_per_byte(axes: Axes, rows: Sequence[Row]) -> bool:
    names = {"val/bpb": "carried state", "val_reset/bpb": "state reset at each window"}
    curves = [(curve(rows, name), label) for name, label in names.items()]
    drawn = [(points, label) for points, label in curves if points[0]]
    for (points, label), color in zip(drawn, (_VALIDATION_COLOR, _COLORS[0])):
        # In the legend, because marks beside two curves that end together lie on each other.
        _draw_sparse(axes, points, f"{label}, last {points[1][-1]:.4g}", color)
    axes.set_ylabel("validation bits per byte")
    if drawn:
        axes.legend(frameon=False)
    return bool(drawn)


def _draw_throughput(axes: Axes, rows: Sequence[Row]) -> bool:
    points = curve(rows, "throughput/tokens_per_second")
    if not points[0]:
        return False
    _draw_noisy(axes, points, "tokens per second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.set_ylabel("tokens per second")
    axes.legend(frameon=False, loc="lower right")
    return True


def _draw_health(suffix: str, label: str) -> Callable[[Axes, Sequence[Row]], bool]:
    """Return a drawing of every `health/.../<suffix>` metric, a share in [0, 1], with one line a region."""

    def draw(axes: Axes, rows: Sequence[Row]) -> bool:
        names = dict.fromkeys(
            name for row in rows for name in row if name.startswith("health/") and name.endswith(suffix)
        )
        for index, name in enumerate(names):
            steps, values = curve(rows, name)
            region = name.removeprefix("health/").removesuffix(suffix).strip("/") or suffix
            smoothed = smooth(values, span=len(values) * _SMOOTHING_SHARE) if len(values) >= 50 else values
            color = _COLORS[index % len(_COLORS)]
            style = ("-", "--", ":")[index // len(_COLORS) % 3]
            axes.plot(steps, smoothed, color=color, linestyle=style, linewidth=1.6, label=region)
        axes.set_ylabel(label)
        axes.set_ylim(-0.02, 1.02)
        if names:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return bool(names)

    return draw


_PLOTS: dict[str, tuple[str, Callable[[Axes, Sequence[Row]], bool]]] = {
    "loss": ("Loss", _draw_loss),
    "bits_per_byte": ("Bits per byte", _draw_bits_per_byte),
    "throughput": ("Throughput", _draw_throughput),
    "firing_rates": ("Firing rate of each region", _draw_health("firing_rate", "share of neurons that fire")),
    "silent": ("Silent neurons of each region", _draw_health("silent", "share of neurons that never fire")),
    "saturated": ("Saturated neurons of each region", _draw_health("saturated", "share of neurons at their ceiling")),
    "go_rate": ("Go gate", _draw_health("go_rate", "mean opening of the gates")),
}


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draw every curve the run has rows for into its plots folder and return the PNG files.

    Raises UserError when it is no run directory or its metrics are broken.
    """
    run = RunDirectory.view(run_dir)
    rows = read_metrics(run.metrics_path)
    run.plots.mkdir(exist_ok=True)
    written = []
    for name, (title, draw) in _PLOTS.items():
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if not draw(axes, rows):
            continue
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_title(run.path.resolve().name, loc="right", fontsize=8, color="0.4")
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        path = run.plots / f"{name}.png"
        figure.savefig(path)
        written.append(path)
    return written


def main() -> int:
    """Plot the run named on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Draw the curves of a run from its metrics.jsonl.")
    parser.add_argument("run_dir", type=Path)
    arguments = parser.parse_args()
    try:
        for path in plot_run(arguments.run_dir):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
