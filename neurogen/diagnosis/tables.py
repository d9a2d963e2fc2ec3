"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

COUNTED = (
    "host_allocations",
    "host_bytes",
    "device_allocations",
    "device_bytes",
    "device_reserved_bytes",
    "host_to_device_copies",
    "host_to_device_bytes",
    "device_to_host_copies",
    "device_to_host_bytes",
    "synchronisations",
    "driver_synchronisations",
    "kernel_launches",
    "operations",
)
MISSING = "-"
Row = dict[str, Any]  # ModeCost.as_dict(), as the result file holds it


def cost_table(rows: Sequence[Row], task: str) -> Table:
    """Time, use and counts of the modes at a task, a column a mode."""
    counted = ", ".join(f"{row['counted_tokens']:,} ({row['mode']})" for row in rows)
    table = Table(
        title=f"{task}: {rows[0]['lanes']} x {rows[0]['tokens']} tokens",
        caption=f"below the line: in the sequence + what a further token adds; counted in tokens: {counted}",
    )
    table.add_column("")
    for row in rows:
        table.add_column(row["mode"], justify="right")

    def line(name: str, values: Iterable[float | None]) -> None:
        cells = [number(value) for value in values]
        if any(cell != MISSING for cell in cells):
            table.add_row(name, *cells)

    line("seconds a sequence", (row["seconds"] for row in rows))
    line("milliseconds a token", (1000 * row["seconds"] / row["tokens"] for row in rows))
    line("tokens/s", (row["tokens_per_second"] for row in rows))
    line("CPU %", (row["cpu_percent"] for row in rows))
    line("GPU %", (row["gpu_percent"] for row in rows))
    line("GPU memory, MB", (_megabytes(row["gpu_memory_bytes"]) for row in rows))
    line("churned a sequence, MB", (row["churned_megabytes"] for row in rows))
    line("Python heap peak, MB", (_megabytes(row["counts"]["python_peak_bytes"]) for row in rows))
    table.add_section()
    for key in COUNTED:
        if rows[0]["counts"][key] is not None:
            cells = (f"{number(row['sequence_counts'][key])} + {number(further(row, key))}" for row in rows)
            table.add_row(key.replace("_", " "), *cells)
    return table


def further(row: Row, key: str) -> float | None:
    """What one more token adds to a count."""
    whole, half = row["counts"][key], row["counts_of_half"][key]
    counted = row["counted_tokens"]
    return None if whole is None else (whole - half) / (counted - counted // 2)


def stage_table(rows: Sequence[Row], task: str) -> Table:
    """Milliseconds a token by stage; the columns add up to the last."""
    alone = any(sum(row["stage_seconds"].values()) == row["stage_seconds"]["other"] for row in rows)
    table = Table(
        title=f"{task}: milliseconds a token by stage",
        caption="all in other: one launch that does everything, which cannot be looked into" if alone else None,
    )
    table.add_column("mode")
    stages = list(rows[0]["stage_seconds"])
    for header in [*stages, "sum"]:
        table.add_column(header.replace("_", " "), justify="right")
    for row in rows:
        per_token = [1000 * row["stage_seconds"][name] / row["clocked_tokens"] for name in stages]
        table.add_row(row["mode"], *(number(x) for x in per_token), number(sum(per_token)))
    return table


def activity_table(activity: Row) -> Table:
    """A line a region's layer."""
    table = Table(title=f"activity; loss {activity['loss']:.3f} nats a token")
    table.add_column("layer")
    for header in (
        "firing rate",
        "silent",
        "saturated",
        "Go rate (least, median, most column)",
        "half-life (least, median, most)",
        "entropy after it",
    ):
        table.add_column(header, justify="right")
    for name, entropy in activity["entropy"].items():
        lives = activity["half_lives"].get(name)
        shares = (activity[key].get(name) for key in ("firing_rate", "silent", "saturated"))
        gates = activity["go_rate"] if name.startswith("broca.") else None
        table.add_row(
            name,
            *("" if share is None else f"{100 * share:.1f} %" for share in shares),
            "" if gates is None else ", ".join(f"{100 * x:.0f} %" for x in gates),
            "" if lives is None else ", ".join(f"{x:.0f}" for x in lives),
            f"{entropy:.3f}",
        )
    return table


def _megabytes(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / 1e6


def number(value: float | None) -> str:
    """Three digits, or all of them before the point; a dash for what is not there."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
