"""Neural health as pictures: `draw_health` writes one PNG each and the numbers behind them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from neurogen.diagnosis.activity import Activity
from neurogen.diagnosis.health import Health
from neurogen.diagnosis.plots import draw_raster, save
from neurogen.diagnosis.trajectory import principal_trajectory
from neurogen.storage.files import write_atomically

NUMBERS = "health.json"


def draw_health(health: Health, folder: Path) -> list[Path]:
    """Write every picture there is something to draw for into `folder`, and health.json; return the pictures."""
    figures = {"memory_horizon": horizon_figure(health)}
    if health.time_constants or health.half_lives:
        figures["time_constants"] = time_constant_figure(health.time_constants, health.half_lives)
    if health.gradient is not None:
        figures["gradient_lag"] = gradient_figure(health.gradient)
    if health.activity is not None:
        if health.activity.spikes:
            figures["spikes"] = spike_figure(health.activity)
        figures["workspace"] = workspace_figure(health.activity.workspace)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        save(figure, paths[-1])
    numbers = json.dumps(health.as_dict(), indent=2, allow_nan=False)
    write_atomically(folder / NUMBERS, numbers.encode("ascii") + b"\n")
    return paths


def horizon_figure(health: Health) -> Figure:
    """Loss against tokens since reset, with the standard error over lanes, and the horizon marked."""
    figure, axes = _one_axes()
    bins = health.context_loss
    middles = [math.sqrt(each.first * each.last) for each in bins]
    errors = [each.error if math.isfinite(each.error) else 0.0 for each in bins]
    axes.errorbar(middles, [each.loss for each in bins], yerr=errors, marker="o", capsize=3, linewidth=1.6)
    if health.horizon is not None:
        axes.axvline(health.horizon, linestyle="--", color="0.4", linewidth=1.0)
        axes.annotate(f" {health.horizon:,} tokens", (health.horizon, axes.get_ylim()[1]), va="top", color="0.3")
    axes.set(
        xscale="log",
        xlabel="tokens read since the state was reset",
        ylabel="loss (nats per token)",
        title="What memory is worth",
    )
    return figure


def gradient_figure(gradient: Tensor) -> Figure:
    """Gradient norm against lag, both logarithmic; a lag l is drawn at l + 1."""
    figure, axes = _one_axes()
    values = gradient.numpy()
    drawn = np.isfinite(values) & (values > 0)
    axes.plot(np.arange(len(values))[drawn] + 1, values[drawn], linewidth=1.6)
    axes.set(
        xscale="log",
        yscale="log" if drawn.any() else "linear",
        xlabel="lag in tokens, plus one",
        ylabel="norm of d loss(t) / d workspace(t - lag)",
        title="How far back the gradient reaches",
    )
    return figure


def time_constant_figure(time_constants: Mapping[str, Tensor], half_lives: Mapping[str, Tensor]) -> Figure:
    """Histograms, logarithmic in time: neurons' time constants, and the half-lives of the memories' heads."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    neurons, heads = figure.subplots(1, 2)
    _histogram(neurons, time_constants, "Time constants of neurons", "neurons")
    _histogram(heads, half_lives, "Half-lives of memory heads", "heads")
    return figure


def _histogram(axes: Axes, values: Mapping[str, Tensor], title: str, unit: str) -> None:
    if values:
        shortest = min(float(x.min()) for x in values.values())
        longest = max(float(x.max()) for x in values.values())
        edges = np.geomspace(shortest / 1.05, longest * 1.05, 25).tolist()
        for name, x in values.items():
            axes.hist(x.numpy(), bins=edges, histtype="step", linewidth=1.6, label=name)
        axes.legend(fontsize="small", frameon=False)
    axes.set(xscale="log", xlabel="tokens", ylabel=unit, title=title)


def spike_figure(activity: Activity) -> Figure:
    """A raster of each cortex layer."""
    figure = Figure(figsize=(11, 3.0 * len(activity.spikes)), layout="constrained")
    grid = figure.subplots(len(activity.spikes), 1, squeeze=False)[:, 0]
    for axes, (name, spikes) in zip(grid, activity.spikes.items()):
        draw_raster(figure, axes, name, spikes, activity.firing_rate[name])
    return figure


def workspace_figure(workspace: Mapping[str, Tensor]) -> Figure:
    """The path of the workspace after each layer in the plane of its own first two principal components, darker with
    time."""
    columns = min(3, len(workspace))
    rows = -(-len(workspace) // columns)
    figure = Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, x) in zip(grid, workspace.items()):
        trajectory = principal_trajectory(x)
        path = trajectory.path.numpy()
        axes.plot(path[:, 0], path[:, 1], color="0.8", linewidth=0.6, zorder=1)
        axes.scatter(path[:, 0], path[:, 1], c=np.arange(len(path)), cmap="viridis_r", s=6, zorder=2)
        axes.set(title=f"{name}: {100 * trajectory.explained:.0f} % of the variance", xlabel="first", ylabel="second")
    for axes in grid[len(workspace) :]:
        axes.set_axis_off()
    return figure


def _one_axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
