"""Results as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from neurogen.diagnosis.activity import Activity

MAX_NEURONS = 256  # rows of a raster


def plot_modes(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """For each task: tokens a second, and milliseconds a token by stage, of every mode."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(11, 3.6 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for (speed, stages), task in zip(axes, tasks):
        of_task = [row for row in rows if row["task"] == task]
        names = [row["mode"] for row in of_task]
        bars = speed.bar(names, [row["tokens_per_second"] for row in of_task], color="tab:blue")
        speed.bar_label(bars, fmt="{:,.0f}")
        speed.margins(y=0.15)
        speed.set(yscale="log", ylabel="tokens a second", title=f"{task}, {of_task[0]['tokens']} tokens")
        bottom = [0.0] * len(names)
        for stage in of_task[0]["stage_seconds"]:
            heights = [1000 * row["stage_seconds"][stage] / row["clocked_tokens"] for row in of_task]
            stages.bar(names, heights, bottom=bottom, label=stage)
            bottom = [low + height for low, height in zip(bottom, heights)]
        stages.set(ylabel="milliseconds a token", title="by stage")
        stages.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def plot_activity(activity: Activity, path: Path) -> None:
    """A raster of spikes for each cortex layer, half-lives of each memory layer, and entropy along the regions."""
    rows = [*activity.spikes, "numbers"]
    heights = [3.0] * len(activity.spikes) + [2.5]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
    for i, (name, spikes) in enumerate(activity.spikes.items()):
        draw_raster(figure, figure.add_subplot(grid[i, :]), name, spikes, activity.firing_rate[name])
    lives = figure.add_subplot(grid[-1, 0])
    for name, values in activity.half_lives.items():
        lives.plot(values.sort().values.numpy(), marker="o", label=name)
    lives.set(xlabel="head, by half-life", ylabel="tokens", yscale="log", title="memory half-lives")
    if activity.half_lives:
        lives.legend(fontsize="small")
    entropy = figure.add_subplot(grid[-1, 1])
    entropy.plot(list(activity.entropy), list(activity.entropy.values()), marker="o")
    entropy.set(ylabel="nats", title="entropy of the decoder's output after each layer")
    entropy.tick_params(axis="x", rotation=30)
    save(figure, path)


def draw_raster(figure: Figure, axes: Axes, name: str, spikes: Tensor, firing_rate: float) -> None:
    """Spikes `[T, D]` of a layer's first neurons: token across, neuron up, brightness the spike."""
    shown = spikes[:, :MAX_NEURONS].T.numpy()
    lowest = min(0.0, float(shown.min()))  # a smooth unit's are negative half of the time
    image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="magma", vmin=lowest)
    figure.colorbar(image, ax=axes, label="spike")
    axes.set(xlabel="token", ylabel="neuron", title=f"{name}: {100 * firing_rate:.1f} % fire")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; no window, no global state."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
