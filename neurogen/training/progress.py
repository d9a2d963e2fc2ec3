"""Where training stands: a bar in a terminal, a plain line now and then anywhere else. Both have one interface."""

import sys
import time
from collections.abc import Mapping
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Progress(Protocol):
    """What the trainer tells its progress to."""

    def update(self, *, step: int, tokens: int, seconds: float, fields: Mapping[str, float]) -> None: ...

    def say(self, text: str) -> None: ...

    def __enter__(self) -> "Progress": ...

    def __exit__(self, *exception: object) -> None: ...


class Budget:
    """The limits of a run; the one that is nearest says how much is done. None is no limit."""

    def __init__(self, *, max_steps: int | None, max_tokens: int | None, max_seconds: float | None) -> None:
        self._limits = (max_steps, max_tokens, max_seconds)

    def fraction(self, *, step: int, tokens: int, seconds: float) -> float:
        """Return the part of the nearest limit that is used up, in [0, 1]; 0 without limits."""
        used = [done / limit for done, limit in zip((step, tokens, seconds), self._limits, strict=True) if limit]
        return min(1.0, max(used, default=0.0))


def _describe(step: int, fields: Mapping[str, float]) -> str:
    return "  ".join([f"step {step}", *(f"{name} {_short(value)}" for name, value in fields.items())])


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class PlainProgress:
    """Print at most one line every `every_seconds`, and the last state when the run ends."""

    def __init__(self, budget: Budget, *, stream: TextIO, every_seconds: float) -> None:
        self._budget = budget
        self._stream = stream
        self._every_seconds = every_seconds
        self._next_time = 0.0
        self._unprinted: str | None = None

    def update(self, *, step: int, tokens: int, seconds: float, fields: Mapping[str, float]) -> None:
        """Take note of the state after a step; print it when a line is due."""
        fraction = self._budget.fraction(step=step, tokens=tokens, seconds=seconds)
        self._unprinted = f"{fraction:6.1%}  {seconds:.0f}s  {_describe(step, fields)}"
        now = time.monotonic()
        if now >= self._next_time:
            self._flush()
            self._next_time = now + self._every_seconds

    def say(self, text: str) -> None:
        """Print a line at once."""
        print(text, file=self._stream, flush=True)

    def _flush(self) -> None:
        if self._unprinted is not None:
            self.say(self._unprinted)
            self._unprinted = None

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush()


class BarProgress:
    """A rich progress bar; `say` prints above it."""

    def __init__(self, budget: Budget, *, console: Console) -> None:
        self._budget = budget
        self._bar = RichProgress(
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=1.0)

    def update(self, *, step: int, tokens: int, seconds: float, fields: Mapping[str, float]) -> None:
        """Show the state after a step; the bar redraws itself a few times a second, so this is cheap."""
        fraction = self._budget.fraction(step=step, tokens=tokens, seconds=seconds)
        self._bar.update(self._task, completed=fraction, description=_describe(step, fields))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "BarProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def make_progress(
    *,
    max_steps: int | None = None,
    max_tokens: int | None = None,
    max_seconds: float | None = None,
    stream: TextIO | None = None,
    every_seconds: float = 10.0,
) -> Progress:
    """Return a bar when `stream` (standard error by default) is a terminal that can draw one, else plain lines."""
    stream = sys.stderr if stream is None else stream
    budget = Budget(max_steps=max_steps, max_tokens=max_tokens, max_seconds=max_seconds)
    console = Console(file=stream)
    if console.is_terminal and not console.is_dumb_terminal:
        return BarProgress(budget, console=console)
    return PlainProgress(budget, stream=stream, every_seconds=every_seconds)
