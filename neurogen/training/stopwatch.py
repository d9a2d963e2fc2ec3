"""The clock of a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Seconds spent training: it stands still while the run evaluates, samples or saves.

    Starting and stopping wait for the device, so that queued work is charged to what queued it.
    """

    def __init__(self, device: torch.device, *, seconds: float = 0.0) -> None:
        self._device = device
        self._before = seconds
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._before + running

    def start(self) -> None:
        assert self._started is None
        self._synchronize()
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._synchronize()
        self._before, self._started = self.seconds, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still inside the context, if it was running."""
        if self._started is None:
            yield
            return
        self.stop()
        try:
            yield
        finally:
            self.start()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
