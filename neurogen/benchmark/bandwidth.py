"""How fast a device reads its memory: what a memory-bound figure is measured against."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

BYTES_ON_GPU = 4 << 30
BYTES_ON_CPU = 64 << 20
NUM_READS = 10


@functools.cache
def read_rate(device: torch.device) -> float:
    """Bytes a second of the quickest of a few reductions over a tensor far larger than any cache; measured once a
    process."""
    num_bytes = BYTES_ON_GPU if device.type == "cuda" else BYTES_ON_CPU
    x = torch.zeros(num_bytes // 4, device=device)
    reductions: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (torch.sum, torch.amax)
    best = min(_seconds(reduce, x) for reduce in reductions for _ in range(NUM_READS))
    return num_bytes / best


def _seconds(reduce: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    if x.device.type != "cuda":
        start = time.perf_counter()
        reduce(x)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    reduce(x)
    begin.record()
    reduce(x)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
