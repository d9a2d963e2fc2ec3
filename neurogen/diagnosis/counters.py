"""Counting what a piece of work allocates, copies, waits for and launches."""

from __future__ import annotations

import functools
import os
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from neurogen import probes

aten = torch.ops.aten
_READS = {aten._local_scalar_dense.default}
# Their result's shape depends on their input's values, which the host must wait for.
_SHAPED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
_COPIES = {aten._to_copy.default, aten.copy_.default}
_LAUNCHES = ("LaunchKernel", "GraphLaunch", "LaunchCooperativeKernel")
_SYNCHRONISATIONS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")


@dataclass(frozen=True)
class Counts:
    """What one run of a piece of work did; None where this machine has nothing to count.

    Arguments:
        operations: torch operations dispatched.
        synchronisations: times the host waited for a device value: item, tolist, bool, int and float of a tensor,
            blocking copies between devices, operations whose shape depends on values. Without a GPU, what would be one.
        host_to_device_copies, host_to_device_bytes, device_to_host_copies, device_to_host_bytes: of tensors.
        host_allocations, host_bytes: by torch's host allocator, freed or not: what is churned.
        python_peak_bytes: growth of the Python heap's peak (tracemalloc).
        device_allocations, device_bytes: by torch's caching allocator, freed or not.
        device_reserved_bytes: of these, asked of the driver.
        kernel_launches, driver_synchronisations: calls of the CUDA runtime.
    """

    operations: int
    synchronisations: int
    host_to_device_copies: int
    host_to_device_bytes: int
    device_to_host_copies: int
    device_to_host_bytes: int
    host_allocations: int
    host_bytes: int
    python_peak_bytes: int
    device_allocations: int | None = None
    device_bytes: int | None = None
    device_reserved_bytes: int | None = None
    kernel_launches: int | None = None
    driver_synchronisations: int | None = None

    @property
    def churned_bytes(self) -> int:
        """Allocated on host and device together."""
        return self.host_bytes + (self.device_bytes or 0)


class _FunctionCounter(TorchFunctionMode):
    """Reads that never reach the dispatcher: they are plain memory accesses for tensors on the CPU."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.cpu) and args[0].device.type == "cpu":
            self.counter.synchronisations += 1
        return func(*args, **(kwargs or {}))


class OperationCounter(TorchDispatchMode):
    """Counts operations, synchronisations and copies while it is entered, those of the reverse pass among them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.synchronisations = 0
        self.copies = {"host_to_device": 0, "device_to_host": 0}
        self.copied_bytes = {"host_to_device": 0, "device_to_host": 0}
        self._others = ExitStack()

    def __enter__(self) -> OperationCounter:
        self._others.enter_context(_FunctionCounter(self))
        self._others.enter_context(probes.listening(copies=self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._others.close()

    def host_copy(self, direction: str, num_bytes: int, device: torch.device) -> None:
        """A copy made by `neurogen.probes`, counted here on a CPU alone: on a GPU the dispatcher shows it too."""
        if device.type == "cpu":
            self.copies[direction] += 1
            self.copied_bytes[direction] += num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations += 1
        masked = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in _READS or func in _SHAPED_BY_VALUES or masked:
            self.synchronisations += 1
        if func in _COPIES:
            source = args[1] if func is aten.copy_.default else args[0]
            blocking = not (kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
            self._count_copy(source, out, blocking)
        return out

    def _count_copy(self, source: Tensor, out: Tensor, blocking: bool) -> None:
        number = source.dim() == 0 and source.device.type == "cpu"  # goes along as an argument of a kernel
        if source.device.type == out.device.type or number:
            return
        direction = "device_to_host" if out.device.type == "cpu" else "host_to_device"
        self.copies[direction] += 1
        self.copied_bytes[direction] += source.numel() * source.element_size()
        self.synchronisations += blocking


def count_host_allocations(work: Callable[[], object]) -> tuple[int, int]:
    """How often, and for how many bytes, `work` asks torch's host allocator for memory, scratch inside operations among
    them."""
    with _profile([ProfilerActivity.CPU], memory=True) as profiler:
        work()
    sizes = [
        event.nbytes()
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU and event.nbytes() > 0
    ]
    return len(sizes), sum(sizes)


def count_runtime_calls(work: Callable[[], object]) -> tuple[int, int]:
    """Kernel launches and synchronisations `work` asks of the CUDA runtime."""
    launches, waits = _runtime_calls(work)
    return launches, max(waits - _own_waits(), 0)


@functools.cache
def _own_waits() -> int:
    """Synchronisations of the measurement itself: ours, and in some versions one of the profiler's."""
    return _runtime_calls(lambda: None)[1]


def _runtime_calls(work: Callable[[], object]) -> tuple[int, int]:
    with _profile([ProfilerActivity.CPU, ProfilerActivity.CUDA], memory=False) as profiler:
        work()
        torch.cuda.synchronize()
    names = [event.name() for event in profiler.profiler.kineto_results.events()]
    launches = sum(any(part in name for part in _LAUNCHES) and name.startswith("cu") for name in names)
    waits = sum(any(part in name for part in _SYNCHRONISATIONS) and name.startswith("cu") for name in names)
    return launches, waits


def _profile(activities: list[ProfilerActivity], *, memory: bool) -> AbstractContextManager[Any]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces every start and stop on stderr
    return profile(activities=activities, profile_memory=memory)


def count_device_allocations(work: Callable[[], object]) -> tuple[int, int, int]:
    """How often, and for how many bytes, `work` asks torch's caching allocator; and bytes that asks of the driver."""
    keys = ("allocation.all.allocated", "allocated_bytes.all.allocated", "reserved_bytes.all.allocated")
    before = torch.cuda.memory_stats()
    work()
    after = torch.cuda.memory_stats()
    first, second, third = (after.get(key, 0) - before.get(key, 0) for key in keys)
    return first, second, third


def count(work: Callable[[], object], device: torch.device) -> Counts:
    """Run `work` a few times, once for each instrument, and count; it should do the same each time."""
    with OperationCounter() as counter:
        work()
    host_allocations, host_bytes = count_host_allocations(work)
    on_gpu = device.type == "cuda"
    launches, waits = count_runtime_calls(work) if on_gpu else (None, None)
    device_allocations, device_bytes, reserved = count_device_allocations(work) if on_gpu else (None, None, None)
    return Counts(
        operations=counter.operations,
        synchronisations=counter.synchronisations,
        host_to_device_copies=counter.copies["host_to_device"],
        host_to_device_bytes=counter.copied_bytes["host_to_device"],
        device_to_host_copies=counter.copies["device_to_host"],
        device_to_host_bytes=counter.copied_bytes["device_to_host"],
        host_allocations=host_allocations,
        host_bytes=host_bytes,
        python_peak_bytes=_python_peak(work),
        device_allocations=device_allocations,
        device_bytes=device_bytes,
        device_reserved_bytes=reserved,
        kernel_launches=launches,
        driver_synchronisations=waits,
    )


def _python_peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        work()
        return max(0, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
