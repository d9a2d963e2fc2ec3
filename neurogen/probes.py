"""Points where a sequence can be observed: named stages of work, and copies between the device and the host.

They cost one global read while nobody listens; `neurogen.diagnosis` listens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

STAGES = ("embed", "cognitive_step", "decode", "sample", "learn")
_IDLE: AbstractContextManager[None] = nullcontext()


class StageListener(Protocol):
    def stage(self, name: str) -> AbstractContextManager[None]: ...


class CopyListener(Protocol):
    def host_copy(self, direction: str, num_bytes: int, device: torch.device) -> None: ...


_stage_listener: StageListener | None = None
_copy_listener: CopyListener | None = None


def stage(name: str) -> AbstractContextManager[None]:
    """A context for one of STAGES; time inside it counts as that stage's, less that of stages nested in it."""
    return _IDLE if _stage_listener is None else _stage_listener.stage(name)


@contextmanager
def listening(*, stages: StageListener | None = None, copies: CopyListener | None = None) -> Iterator[None]:
    """Send what happens inside the context to the listeners given; one of a kind at a time."""
    global _stage_listener, _copy_listener
    before = _stage_listener, _copy_listener
    _stage_listener, _copy_listener = stages or before[0], copies or before[1]
    try:
        yield
    finally:
        _stage_listener, _copy_listener = before


def to_host(x: Tensor) -> Tensor:
    """A new tensor in host memory, pinned if x is on a GPU, so that the copy need not be waited for: it is safe to read
    for the stream's later work, and for the host after a synchronisation. A CPU tensor is cloned."""
    if _copy_listener is not None:
        _copy_listener.host_copy("device_to_host", x.numel() * x.element_size(), x.device)
    return x.to("cpu", non_blocking=True, copy=True)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A new tensor on `device` with a host tensor's values; the inverse of `to_host`."""
    if _copy_listener is not None:
        _copy_listener.host_copy("host_to_device", x.numel() * x.element_size(), device)
    return x.to(device, non_blocking=True, copy=True)
