"""Result files to Markdown tables and a picture."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

UNITS = {
    "us_per_step": ("us a step", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "useful_tflops": ("useful TFLOP/s", "{:.0f}"),
    "model_tflops": ("model TFLOP/s", "{:.0f}"),
    "bytes_per_step": ("bytes a step", "{:,.0f}"),
    "copy_rate": ("read and written, B/s", "{:.3g}"),
    "read_rate": ("measured read rate, B/s", "{:.3g}"),
    "read_share": ("share of it", "{:.1%}"),
}


Row = dict[str, Any]  # as `harness.Row` is written


def markdown(path: Path) -> str:
    """One table an op and shape, fastest first, what failed last with its reason.

    Arguments:
        path: a file written by `write_rows`.
    """
    return "\n".join(_table(key, rows) for key, rows in _groups(path).items())


def summary(path: Path) -> str:
    """One table for all: a line an op and shape, ours and the quickest of the others.

    Arguments:
        path: a file written by `write_rows`.
    """
    lines = ["| work | ours | the quickest other | |", "|---|---|---|---|"]
    for (op, shape, dtype, device), rows in _groups(path).items():
        timed = sorted((row for row in rows if row["median"] is not None), key=lambda row: row["median"])
        ours = [row for row in timed if row["provider"].startswith("neurogen fused")]
        others = [row for row in timed if not row["provider"].startswith("neurogen fused")]
        ratio = f"{others[0]['median'] / ours[0]['median']:.2f} x" if ours and others else ""
        cells = [f"{op}: {shape}, {dtype}, {device}", *(_best(which) for which in (ours, others)), ratio]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(path: Path, picture: Path) -> None:
    """A row of bars for each op and shape: median time of each provider, with its spread from p20 to p80; no picture
    where nothing was timed."""
    groups = {
        key: sorted((row for row in rows if row["median"] is not None), key=lambda row: row["median"])
        for key, rows in _groups(path).items()
    }
    groups = {key: rows for key, rows in groups.items() if rows}
    if not groups:
        return
    heights = [0.6 + 0.3 * len(rows) for rows in groups.values()]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, ((op, shape, dtype, device), rows) in zip(axes[:, 0], groups.items()):
        medians = [1e3 * row["median"] for row in rows]
        spread = [
            [1e3 * (row["median"] - row["p20"]) for row in rows],
            [1e3 * (row["p80"] - row["median"]) for row in rows],
        ]
        colours = ["tab:blue" if row["provider"].startswith("neurogen") else "tab:gray" for row in rows]
        axis.barh([row["provider"] for row in rows], medians, xerr=spread, color=colours)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_title(f"{op}: {shape}, {dtype}; ms on {device}", fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _groups(path: Path) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in json.loads(path.read_text()):
        shape = ", ".join(f"{letter}={size}" for letter, size in row["shape"].items())
        groups[row["op"], shape, row["dtype"], row["machine"]["device"]].append(row)
    return groups


def _best(rows: list[Row]) -> str:
    """The first of rows sorted by time, in a cell."""
    if not rows:
        return ""
    row = rows[0]
    name = row["provider"].removeprefix("neurogen fused").strip(" ,")
    figures = [f"{UNITS[key][1].format(value)} {UNITS[key][0]}" for key, value in row["extra"].items() if key in UNITS]
    return ", ".join([*([name] if name else []), f"{1e3 * row['median']:.3f} ms", *figures])


def _table(key: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    op, shape, dtype, device = key
    versions = sorted({_versions(row["machine"]) for row in rows})
    extras = [name for name in UNITS if any(name in row["extra"] for row in rows)]
    head = ["provider", "launched", "median ms", "p20 to p80", *(UNITS[name][0] for name in extras), "peak MB", "error"]
    lines = [
        f"### {op}: {shape}, {dtype}",
        "",
        f"{device}; {'; '.join(versions)}",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in sorted(rows, key=lambda row: (row["median"] is None, row["median"] or 0.0)):
        if row["failure"] is not None:
            cells = [row["provider"], row["failure"].replace("|", "/"), *[""] * (len(head) - 2)]
        else:
            spread = f"{row['p20'] * 1e3:.3f} to {row['p80'] * 1e3:.3f}"
            figures = [UNITS[name][1].format(row["extra"][name]) if name in row["extra"] else "" for name in extras]
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            launched = "as a graph" if row.get("recorded") else "one by one"
            cells = [row["provider"], launched, f"{row['median'] * 1e3:.3f}", spread, *figures, peak, error]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _versions(machine: dict[str, str]) -> str:
    names = ("torch", "triton", "cuda", "python")
    return ", ".join(f"{name} {machine[name]}" for name in names if name in machine) + f", commit {machine['commit']}"
