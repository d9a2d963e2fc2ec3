"""metrics.jsonl: one strict JSON object a step, append-only, the source of truth that plots and loggers follow.

A row is `{"step": 100, "tokens": 51200, "seconds": 12.5, "train/loss": 2.31, ...}`. JSON has no NaN, so numbers that
are not finite are the strings "NaN", "Infinity" and "-Infinity"; no other value is a string, and `read_metrics` turns
them back.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from neurogen.errors import UserError
from neurogen.storage.files import parse_json

Row = dict[str, int | float]

REQUIRED = ("step", "tokens", "seconds")
_NAMES: dict[str, float] = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _number(value: SupportsFloat) -> int | float:
    """Turn a Python, numpy or 0-d tensor number into a Python one; whole-number types stay whole."""
    plain: Any = value.item() if hasattr(value, "item") else value
    return int(plain) if isinstance(plain, int) else float(plain)


def _spell(value: int | float) -> int | float | str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _parse_row(line: bytes) -> Row:
    row = parse_json(line)
    if not isinstance(row, dict):
        raise ValueError("not an object")
    values = {
        name: _NAMES[value] if isinstance(value, str) and value in _NAMES else value for name, value in row.items()
    }
    for name, value in values.items():
        if type(value) not in (int, float):
            raise ValueError(f"{name} is not a number")
    if missing := [name for name in REQUIRED if name not in values]:
        raise ValueError(f"{missing[0]} is missing")
    if type(values["step"]) is not int:
        raise ValueError("step is not a whole number")
    return values


def _scan(path: Path) -> list[tuple[Row, int]]:
    """Return each row with the offset of its end. A torn last line is left out; any other bad line raises UserError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a run directory that has metrics") from error
    lines = [line + b"\n" for line in content.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    if not lines[-1]:
        lines.pop()
    rows: list[tuple[Row, int]] = []
    offset = 0
    for number, line in enumerate(lines, start=1):
        offset += len(line)
        try:
            if not line.endswith(b"\n"):
                raise ValueError("has no end")
            row = _parse_row(line)
        except ValueError as error:
            if number == len(lines):
                break  # the writer died in the middle of this row
            raise UserError(f"{path} line {number}: {error}; delete the file from this line on") from error
        if rows and row["step"] <= rows[-1][0]["step"]:
            raise UserError(
                f"{path} line {number}: step {row['step']} does not follow step {rows[-1][0]['step']}; "
                "delete the file from this line on"
            )
        rows.append((row, offset))
    return rows


def read_metrics(path: str | Path) -> list[Row]:
    """Return all rows, oldest first, non-finite numbers as floats. A torn last line is left out.

    Raises UserError when the file cannot be read or a line other than the last is no row.
    """
    return [row for row, _ in _scan(Path(path))]


class MetricsWriter:
    """Append rows to metrics.jsonl, each in one write that is on its way to the disk when `write` returns.

    With resume_step=k the file goes on exactly where the checkpoint of step k was: rows of later steps, and a line
    torn by a crash, are cut off. Without it the file must be new or empty. Raises UserError for a file with rows that
    nobody asked to resume, or that is broken before its last line.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        rows: list[tuple[Row, int]] = []
        if self.path.exists() and self.path.stat().st_size:
            if resume_step is None:
                raise UserError(f"{self.path} has rows already; resume that run or give a new run directory")
            rows = [(row, end) for row, end in _scan(self.path) if row["step"] <= resume_step]
        self._last_step: int | float = rows[-1][0]["step"] if rows else -1
        self._end = rows[-1][1] if rows else 0
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._descriptor, self._end)
        os.lseek(self._descriptor, self._end, os.SEEK_SET)

    def write(self, metrics: Mapping[str, SupportsFloat], *, step: int, tokens: int, seconds: float) -> Row:
        """Append the one row of a step and return it. Steps strictly increase: give a step's metrics all at once.

        Raises ValueError for a step that does not follow the last row's or a metric called like a required column,
        OSError when the disk refuses (what was written of the row is taken back, so the file stays sound).
        """
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} after step {self._last_step}: steps strictly increase")
        if clash := [name for name in REQUIRED if name in metrics]:
            raise ValueError(f"a metric cannot be called {clash[0]!r}, every row has that column")
        row: Row = {"step": int(step), "tokens": int(tokens), "seconds": float(seconds)}
        row |= {name: _number(value) for name, value in metrics.items()}
        spelled = {name: _spell(value) for name, value in row.items()}
        line = json.dumps(spelled, allow_nan=False).encode("ascii") + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            os.lseek(self._descriptor, self._end, os.SEEK_SET)
            raise
        self._end += len(line)
        self._last_step = step
        return row

    def sync(self) -> None:
        """Put all rows on the disk. Call it before a checkpoint of the same step, which relies on them."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Sync and close; closing twice is fine."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
