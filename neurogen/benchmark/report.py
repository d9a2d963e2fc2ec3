"""Result files to Markdown tables."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

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


def markdown(path: Path) -> str:
    """One table an op and shape, fastest first, what failed last with its reason.

    Arguments:
        path: a file written by `write_rows`.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in json.loads(path.read_text()):
        shape = ", ".join(f"{letter}={size}" for letter, size in row["shape"].items())
        groups[row["op"], shape, row["dtype"], row["machine"]["device"]].append(row)
    return "\n".join(_table(key, rows) for key, rows in groups.items())


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
