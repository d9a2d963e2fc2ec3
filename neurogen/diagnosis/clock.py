"""Time by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neurogen import probes
from neurogen.probes import STAGES

OTHER = "other"


class StageClock:
    """Times the stages of the work done while it is entered; every moment belongs to exactly one, so that they add up.

    Time between the start and the end of a stage is its own, less that of stages inside it; the rest is `other`. On a
    GPU the marks are events in its stream, read once at the end, and the time is the device's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._stack = [OTHER]

    def __enter__(self) -> StageClock:
        self._listening = probes.listening(stages=self)
        self._listening.__enter__()
        if self._on_gpu:
            torch.cuda.synchronize()
        self._mark()
        return self

    def __exit__(self, *error: object) -> None:
        self._mark()
        self._listening.__exit__(None, None, None)
        if self._on_gpu:
            torch.cuda.synchronize()
        self.seconds = dict.fromkeys((*STAGES, OTHER), 0.0)
        for (name, start), (_, end) in zip(self._marks, self._marks[1:]):
            self.seconds[name] += _seconds_between(start, end)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        assert name in STAGES, f"{name} is no stage"
        self._stack.append(name)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def _mark(self) -> None:
        """From here on, time is that of the stage on top of the stack."""
        moment: float | torch.cuda.Event = time.perf_counter()
        if self._on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((self._stack[-1], moment))


def _seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float):
        assert isinstance(end, float)
        return end - start
    assert not isinstance(end, float)
    return start.elapsed_time(end) / 1000.0
