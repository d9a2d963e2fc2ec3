"""Batches made ahead of time by a thread and copied to the GPU while it works on the last one."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from neurogen.data.batches import Batch, Batches, count_targets, expand, foreign_targets, host_batch


class Prefetcher:
    """Iterates over `batches` on `device`, `depth` of them ahead of the reader.

    On a CUDA device, ids travel in the stream's narrow type from pinned memory, on a stream of their own, and become
    int64 there: 2 or 3 bytes a token over the bus instead of 17. On the CPU the thread alone remains.

    num_batches: batches handed out. num_stalls: how many of them were not ready. `state_dict` is the position of the
    reader, not of the thread. Use as a context manager, or call `close`.
    """

    def __init__(self, batches: Batches, device: torch.device | str, *, depth: int = 2) -> None:
        assert depth >= 1, depth
        self._batches = batches
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self._copies = torch.cuda.Stream(self._device) if self._on_gpu else None
        self._depth = depth
        self._state, self._epoch = batches.state_dict(), batches.epoch
        self.num_batches = self.num_stalls = 0
        self._host_seconds = self._gpu_seconds = 0.0
        self._gpu_waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._failure: BaseException | None = None
        self._start()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        try:
            item = self._ready.get_nowait()
        except queue.Empty:
            # The first batch after a start cannot be ready: its wait is counted, but it is no stall of the thread.
            self.num_stalls += self.num_batches > self._first
            began = time.perf_counter()
            item = self._ready.get()
            self._host_seconds += time.perf_counter() - began
        if isinstance(item, BaseException):
            self._failure = item
            self.close()
            raise item
        batch, copied, self._state, self._epoch = item
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record(current)
            current.wait_event(copied)
            ended.record(current)
            self._gpu_waits.append((begun, ended))
            self._sum_gpu_waits()
            for tensor in (batch.input_ids, batch.target_ids, batch.document_start):
                tensor.record_stream(current)
        self.num_batches += 1
        return batch

    @property
    def wait_seconds(self) -> float:
        """Time lost to data: by the host on batches that were not ready, and by the GPU on copies that had not arrived.

        No less than the true loss: what the host waits, the GPU may have been busy. Waits that the GPU has not come to
        yet are not in it.
        """
        self._sum_gpu_waits()
        return self._host_seconds + self._gpu_seconds

    def _sum_gpu_waits(self) -> None:
        """Add the waits the GPU is through with; asks, and does not wait for it."""
        while self._gpu_waits and self._gpu_waits[0][1].query():
            begun, ended = self._gpu_waits.popleft()
            self._gpu_seconds += begun.elapsed_time(ended) / 1e3

    @property
    def epoch(self) -> int:
        """The epoch of the reader, as `batches` counts it."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, as `batches` would give it."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Throw away what was made ahead and continue from `state`. Raises UserError as `batches` does."""
        self.close()
        self._batches.load_state_dict(state)
        self._state, self._epoch = self._batches.state_dict(), self._batches.epoch
        self._start()

    def close(self) -> None:
        """Stop the thread. `batches` is left somewhere ahead of the reader: its position is `state_dict()` here."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)  # make room for a thread that is waiting to hand something over
            except queue.Empty:
                continue
        self._thread.join()

    def _start(self) -> None:
        self._first = self.num_batches
        self._failure = None
        self._stop = threading.Event()
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=self._depth)
        self._thread = threading.Thread(target=self._work, name="data-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                batch, copied = self._make()
                self._ready.put((batch, copied, self._batches.state_dict(), self._batches.epoch))
        except BaseException as error:  # handed to the reader, which raises it
            self._ready.put(error)

    def _make(self) -> tuple[Batch, torch.cuda.Event | None]:
        start_id = self._batches.stream.document_start_id
        window = self._batches.next_window()
        if self._copies is None:
            return host_batch(*window, start_id), None
        num_targets = count_targets(window[0], foreign_targets(*window, start_id))
        ids, resets = (torch.from_numpy(array) for array in window)
        with torch.cuda.stream(self._copies):
            # Pinned buffers come from torch's own cache, which holds each back until its copy is done.
            ids, resets = (
                tensor.contiguous().pin_memory().to(self._device, non_blocking=True) for tensor in (ids, resets)
            )
            batch = expand(ids, resets, start_id)
            batch.num_targets = num_targets
            copied = torch.cuda.Event()
            copied.record()
        return batch, copied
