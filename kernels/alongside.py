"""Launches that run at the same time: two kernels of few programs each, neither of which needs the other."""

import contextlib
from collections.abc import Callable, Iterator

import torch

_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextlib.contextmanager
def alongside(device: torch.device, *, num_programs: int) -> Iterator[Callable[[], None]]:
    """What is launched inside runs beside what is launched after it, until the function that the context gives is
    called: then the current stream waits.

    Memory that the launches use is allocated before and kept until that call. They run one after the other as usual
    where there is no GPU, or where `num_programs`, how many of them the GPU is given, keep all of it busy.
    """
    if device.type != "cuda" or num_programs >= torch.cuda.get_device_properties(device).multi_processor_count:
        yield lambda: None
        return
    current = torch.cuda.current_stream(device)
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device, priority=-1)  # of the chain of a step: see kernels.linear.beside
    other = _streams[device]
    other.wait_stream(current)
    with torch.cuda.stream(other):
        yield lambda: current.wait_stream(other)
