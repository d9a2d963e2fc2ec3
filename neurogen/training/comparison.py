"""Several runs side by side: a Markdown table, rows and curves, from their metrics.jsonl and configurations."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from neurogen.config.compose import build_config, config_to_dict
from neurogen.config.schema import Config
from neurogen.errors import UserError
from neurogen.storage.files import write_atomically
from neurogen.training.metrics import Row, read_metrics
from neurogen.training.plots import _COLORS, curve, smooth
from neurogen.training.run_directory import RunDirectory

# Where a run is kept, what it draws and which of several seeds it had: the same experiment otherwise.
APART_KEYS = ("run_dir", "resume", "seed", "logger", "trainer.health_plots", "trainer.cuda_graph")
METRICS = {"val/bpb": "bits per byte", "val/loss": "loss", "val_reset/bpb": "reset bits per byte"}
# The limit that a run was given, and how a table names it.
BUDGETS = {
    "trainer.max_seconds": "{:g} s",
    "trainer.max_tokens": "{:,} tokens",
    "trainer.max_steps": "{:,} steps",
}


@dataclass(frozen=True)
class Run:
    """One run: its directory's name, its configuration as flat keys, rows, how it ended, and on what it last ran."""

    name: str
    config: dict[str, Any]
    rows: list[Row]
    state: str = "finished"
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def budget(self) -> str:
        """The limit it was given: seconds if it has any, else tokens, else steps."""
        known = ((form, self.config.get(key)) for key, form in BUDGETS.items())
        return next((form.format(limit) for form, limit in known if limit is not None), "-")

    @property
    def tokens_per_second(self) -> float:
        """Over the whole of training."""
        return float(self.rows[-1]["tokens"]) / max(float(self.rows[-1]["seconds"]), 1e-9)


def read_run(path: str | Path) -> Run:
    """Read a run directory. Raises UserError if it is none, or has no rows."""
    directory = RunDirectory.view(path)
    rows = read_metrics(directory.metrics_path)
    if not rows:
        raise UserError(f"{directory.metrics_path} has no rows yet; compare runs that have logged something")
    state = str(directory.read_status().get("state", "unknown"))
    config, machine = _flat(_completed(directory.read_config())), directory.read_machine()
    return Run(directory.path.resolve().name, config, rows, state, machine)


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """With its default where a setting came after the run: a setting's default is what was done before there was one.

    A configuration that this version cannot build has settings that are gone; it is compared as it stands.
    """
    try:
        return config_to_dict(build_config(config, Config))
    except UserError:
        return config


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, together, under the settings that tell the groups apart."""
    configs = [{key: value for key, value in run.config.items() if not _is_apart(key)} for run in runs]
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


def _is_apart(key: str) -> bool:
    return key in APART_KEYS or key.split(".")[0] in APART_KEYS


def _identity(run: Run, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(repr(run.config.get(key, _MISSING)) for key in keys)


def last_value(run: Run, name: str) -> float | None:
    """The metric in the last row that has it, or None."""
    return next((float(row[name]) for row in reversed(run.rows) if name in row), None)


def comparison_table(runs: Sequence[Run]) -> str:
    """A Markdown table, a row an experiment: mean and, of several seeds, the sample standard deviation of each metric's
    last value; budget by budget, best by the first metric first. Runs that did not finish are named below it."""
    shown = {key: title for key, title in METRICS.items() if any(last_value(run, key) is not None for run in runs)}
    lines = [
        f"| budget | run | seeds | steps | M tokens | seconds | tokens/s | {' | '.join(shown.values())} |",
        f"|---|---|---|---|---|---|---|{'---|' * len(shown)}",
    ]
    ranked = []
    for label, members in group_runs(runs).items():
        cells = [
            _spread([float(run.rows[-1]["step"]) for run in members], digits=0),
            _spread([float(run.rows[-1]["tokens"]) / 1e6 for run in members], digits=1),
            _spread([float(run.rows[-1]["seconds"]) for run in members], digits=1),
            _spread([run.tokens_per_second for run in members], digits=0),
        ]
        metrics = {key: [value for run in members if (value := last_value(run, key)) is not None] for key in shown}
        cells += [_spread(values, digits=4) for values in metrics.values()]
        first = next(iter(metrics.values()), [])
        rank = statistics.fmean(first) if first else math.nan
        budget = members[0].budget
        line = f"| {budget} | {_without_budget(label)} | {len(members)} | {' | '.join(cells)} |"
        ranked.append((_budget_size(members[0]), math.inf if math.isnan(rank) else rank, line))
    notes = [f"\nNot finished: {run.name} ({run.state})." for run in runs if run.state != "finished"]
    return "\n".join([*lines, *(line for *_, line in sorted(ranked)), *notes]) + "\n"


def _budget_size(run: Run) -> float:
    return next((float(run.config[key]) for key in BUDGETS if run.config.get(key) is not None), math.inf)


def _without_budget(label: str) -> str:
    """A group's label less the limit, which has a column of its own."""
    parts = [part for part in label.split(", ") if part.split("=")[0] not in BUDGETS]
    return ", ".join(parts) or label


def curve_differences(runs: Sequence[Run]) -> str:
    """How far apart training curves are: a Markdown table, a row a setting.

    For each setting, all pairs of runs that differ in it alone; of each pair the root mean square, over the steps both
    logged, of the difference of their training losses in nats. What a setting is to leave alone differs no more than
    what two seeds do.

    Raises UserError if no two runs differ in one setting alone.
    """
    ignored = tuple(key for key in APART_KEYS if key != "seed")
    configs = [{key: value for key, value in run.config.items() if not key.startswith(ignored)} for run in runs]
    found: dict[str, list[float]] = {}
    for (a, one), (b, other) in itertools.combinations(zip(runs, configs), 2):
        keys = [key for key in one.keys() | other.keys() if one.get(key, _MISSING) != other.get(key, _MISSING)]
        if len(keys) == 1:
            losses, others = ({row["step"]: row["train/loss"] for row in x.rows if "train/loss" in row} for x in (a, b))
            squares = [(float(losses[step]) - float(others[step])) ** 2 for step in losses.keys() & others.keys()]
            if squares:
                found.setdefault(keys[0], []).append(math.sqrt(statistics.fmean(squares)))
    if not found:
        raise UserError("--differences: no two of these runs differ in one setting alone")
    lines = ["| runs that differ in | pairs | difference, mean | least | largest |", "|---|---|---|---|---|"]
    for key, values in sorted(found.items(), key=lambda item: statistics.fmean(item[1])):
        numbers = (statistics.fmean(values), min(values), max(values))
        lines.append(f"| {key} | {len(values)} | {' | '.join(f'{x:.4f}' for x in numbers)} |")
    return "\n".join(lines) + "\n"


def comparison_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Plain data for JSON, an object a run: what the table is made from."""
    return [
        {
            "group": label,
            "run": run.name,
            "seed": run.config.get("seed"),
            "budget": run.budget,
            "state": run.state,
            "steps": run.rows[-1]["step"],
            "tokens": run.rows[-1]["tokens"],
            "seconds": run.rows[-1]["seconds"],
            "tokens_per_second": run.tokens_per_second,
            **_largest_wait(run),
            **{key: value for key in METRICS if (value := _finite(last_value(run, key))) is not None},
            **_best(run),
            "machine": run.machine,
        }
        for label, members in group_runs(runs).items()
        for run in members
    ]


def _best(run: Run) -> dict[str, dict[str, float]]:
    """The lowest validation loss on the way, and where: what counts where a text is read until it is known by heart."""
    found = [(float(row["val/loss"]), row) for row in run.rows if "val/loss" in row]
    finite = [(loss, row) for loss, row in found if math.isfinite(loss)]
    if not finite:
        return {}
    loss, row = min(finite, key=lambda pair: pair[0])
    return {"best": {"val/loss": loss, "step": row["step"], "seconds": row["seconds"]}}


def _largest_wait(run: Run) -> dict[str, float]:
    """The largest share of time spent waiting for data between two rows, where batches are read ahead."""
    shares = [float(row["data/wait_share"]) for row in run.rows if "data/wait_share" in row]
    return {"largest_wait_share": max(shares)} if shares else {}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _spread(values: Sequence[float], *, digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):,.{digits}f}"
    if not all(math.isfinite(value) for value in values):
        return mean  # nan: one of the seeds is not a number, which no spread describes
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def plot_comparison(runs: Sequence[Run], *paths: Path) -> None:
    """Draw training loss by step and by second, and validation bits per byte by second, to each path in the format of
    its suffix; one colour an experiment, a line a seed, and a broken line where a budget of seconds ends."""
    # The same runs give the same SVG.
    with matplotlib.rc_context({"svg.hashsalt": "comparison"}):
        figure = Figure(figsize=(15, 4.8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        panels = (("train/loss", "step"), ("train/loss", "seconds"), ("val/bpb", "seconds"))
        groups = group_runs(runs)
        seconds = [run.config.get("trainer.max_seconds") for run in runs]
        budgets = {float(each) for each in seconds if each is not None}
        for axes, (name, along) in zip(figure.subplots(1, 3), panels):
            for index, (label, members) in enumerate(groups.items()):
                for number, run in enumerate(members):
                    _draw_run(axes, run, name, along, index, label if number == 0 else None)
            for budget in budgets if along == "seconds" else ():
                axes.axvline(budget, color="0.6", linestyle="--", linewidth=0.8)
            axes.set_xlabel(along)
            axes.set_ylabel(
                {"train/loss": "training loss (nats per token)", "val/bpb": "validation bits per byte"}[name]
            )
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        # Below the panels, since names of settings are long.
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=7)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_run(axes: Axes, run: Run, name: str, along: str, index: int, label: str | None) -> None:
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
        linewidth=1.2,
        label=label,
    )


def write_comparison(runs: Sequence[Run], folder: Path, name: str) -> str:
    """Write `<name>.md`, `.json`, `.png` and `.svg` into a folder; return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    table = comparison_table(runs)
    write_atomically(folder / f"{name}.md", table.encode())
    rows = json.dumps(comparison_rows(runs), indent=1, allow_nan=False)
    write_atomically(folder / f"{name}.json", rows.encode() + b"\n")
    plot_comparison(runs, folder / f"{name}.png", folder / f"{name}.svg")
    return table


def insert_section(document: str, name: str, text: str) -> str:
    """A document with what is between the lines `<!-- name -->` and `<!-- /name -->` replaced.

    Raises UserError if it has not exactly one such pair, in this order.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if document.count(first) != 1 or document.count(last) != 1 or document.index(first) > document.index(last):
        raise UserError(f"no place for {name}: the document needs one line {first.strip()} and after it {last.strip()}")
    return document[: document.index(first) + len(first)] + text + document[document.index(last) :]
