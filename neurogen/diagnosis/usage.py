"""How busy the CPU and the GPU are while something runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import psutil
import torch

SAMPLE_SECONDS = 0.05
REPORT_SECONDS = 1.0  # the driver's figure may be of as long before


class UsageMeter:
    """CPU use of this process and use of the GPU while entered.

    Attributes:
        seconds: wall time, the device's work included.
        cpu_percent: CPU time of all threads over wall time; 100 is one core.
        gpu_percent: mean of what the driver reports (nvidia-ml-py): the share of time with a kernel running. Reports of
            the first second are of the time before and do not count where there are later ones. None without a GPU
            or that library, or if the work ended before the first report.
        gpu_memory_bytes: peak of torch's allocations on the GPU, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = self.cpu_percent = 0.0
        self.gpu_percent: float | None = None
        self.gpu_memory_bytes: int | None = None
        self._samples: list[tuple[float, int]] = []  # seconds since the start, and percent
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> UsageMeter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            use = gpu_use_reader(self.device)
            if use is not None:
                self._thread = threading.Thread(target=self._sample, args=(use,), daemon=True)
                self._thread.start()
        self._process = psutil.Process()
        self._cpu_start, self._start = self._cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._start
        self.cpu_percent = 100.0 * (self._cpu_seconds() - self._cpu_start) / self.seconds
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        self.gpu_percent = mean_report(self._samples)
        if self.device.type == "cuda":
            self.gpu_memory_bytes = torch.cuda.max_memory_allocated(self.device)

    def _cpu_seconds(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def _sample(self, use: Callable[[], int]) -> None:
        start = time.perf_counter()
        while not self._stop.wait(SAMPLE_SECONDS):
            self._samples.append((time.perf_counter() - start, use()))


def mean_report(samples: Sequence[tuple[float, int]]) -> float | None:
    """Mean percent of what is left of (seconds, percent) once the first second is left out, or of all."""
    percents = [percent for seconds, percent in samples if seconds > REPORT_SECONDS] or [use for _, use in samples]
    return sum(percents) / len(percents) if percents else None


def gpu_use_reader(device: torch.device) -> Callable[[], int] | None:
    """What reads the driver's figure for a GPU's use, in percent; None if nvidia-ml-py is not installed, or the driver
    does not know the device (a part of a GPU) or does not report its use."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetUtilizationRates(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
