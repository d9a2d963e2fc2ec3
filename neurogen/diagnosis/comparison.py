"""The modes beside the system this project grew from, as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neurogen.diagnosis.run import FORMAT
from neurogen.diagnosis.tables import number
from neurogen.errors import UserError
from neurogen.modes import MODES

HEADER = ("", "time for {tokens} tokens", "tokens/s", "CPU %", "GPU %", "MB churned per sequence")


class Line(NamedTuple):
    """One system: seconds for the sequence, tokens a second, percents, megabytes; None where unknown."""

    name: str
    seconds: float | None
    tokens_per_second: float | None
    cpu_percent: float | None
    gpu_percent: float | None
    megabytes: float | None


# Figures of the earlier C++ system's own report, and what its plan promised for 500 tokens at width 1536.
EARLIER_TOKENS = 500
EARLIER = (
    Line("earlier system, measured", 50.0, 10.0, 100.0, 10.0, None),
    Line("earlier system, planned", 0.2, 2500.0, 15.0, 90.0, 0.01),
)


def load_result(path: str | Path) -> dict[str, Any]:
    """A file of scripts/diagnose.py what=modes. Raises UserError if there is none or it is something else."""
    try:
        result = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"no result file at {path}; make one with scripts/diagnose.py") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a result file: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT or result.get("what") != "modes":
        raise UserError(f"{path} is no result of scripts/diagnose.py what=modes (format {FORMAT})")
    return result


def comparison(result: dict[str, Any], task: str = "train") -> str:
    """The earlier report's columns for every mode at a task, and what they were measured on, in Markdown.

    Raises UserError if the result has no such task.
    """
    rows = sorted((row for row in result["rows"] if row["task"] == task), key=lambda row: MODES.index(row["mode"]))
    if not rows:
        tasks = sorted({row["task"] for row in result["rows"]})
        raise UserError(f"the result has no task {task!r}; it has {', '.join(tasks)}")
    lines = [*EARLIER, *(_line(row) for row in rows)]
    header = [cell.format(tokens=rows[0]["tokens"]) for cell in HEADER]
    rule = ["---", *["---:"] * (len(header) - 1)]
    table = [_markdown(cells) for cells in (header, rule, *(_cells(line) for line in lines))]
    return "\n".join([*table, "", _caption(result, rows[0], task)]) + "\n"


def _line(row: dict[str, Any]) -> Line:
    return Line(
        f"`mode={row['mode']}`",
        row["seconds"],
        row["tokens_per_second"],
        row["cpu_percent"],
        row["gpu_percent"],
        row["churned_megabytes"],
    )


def _cells(line: Line) -> list[str]:
    seconds = "-" if line.seconds is None else f"{number(line.seconds)} s"
    return [line.name, seconds, *(number(value) for value in line[2:])]


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _caption(result: dict[str, Any], row: dict[str, Any], task: str) -> str:
    place = result["environment"]
    lanes = "" if row["lanes"] == 1 else f" in {row['lanes']} lanes"
    recorded = (
        " A step recorded as a CUDA graph, as mode=fused trains, has its memory from before."
        if (task == "train" and place["device_type"] == "cuda")
        else ""
    )
    scale = "" if row["tokens"] == EARLIER_TOKENS else f" The earlier system's times are for {EARLIER_TOKENS} tokens."
    return (
        f"`{task}` of `model={result['model']}` (width {result['embedding_dim']}, {result['precision']}), "
        f"{row['tokens']} tokens{lanes}, on {place['device']}, torch {place['torch']}. CPU: 100 is one core. "
        f"MB churned: bytes that torch's allocators on host and device handed out in a further sequence of the same "
        f"length.{recorded}{scale}"
    )
