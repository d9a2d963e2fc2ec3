"""What one mode costs on one sequence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurogen.config.schema import AdamWConfig
from neurogen.data import Batch
from neurogen.diagnosis.clock import StageClock
from neurogen.diagnosis.counters import Counts, count
from neurogen.diagnosis.usage import UsageMeter
from neurogen.model import NeuroGen
from neurogen.modes import TOKEN_BY_TOKEN
from neurogen.training.optimizer import build_optimizer
from neurogen.training.precision import Precision
from neurogen.training.recorded import NUM_PLAIN_STEPS, RecordedUpdate, can_record
from neurogen.training.update import Update

TASKS = ("train", "generate")
WARM_UP_TOKENS = 4
TIMED_SECONDS = 3.0  # runs are repeated until they took this long: reports of GPU use count after the first second


@dataclass(frozen=True)
class ModeCost:
    """One mode at one task.

    Arguments:
        mode, task: names.
        lanes, tokens: shape of the sequence.
        seconds: median of `num_runs` runs; wall time, the device's work included.
        stage_seconds: where the time of another, clocked run of `clocked_tokens` tokens a lane went; the stages add up
            to `clocked_seconds`.
        cpu_percent: over all of those runs; 100 is one core.
        gpu_percent, gpu_memory_bytes: None without a GPU.
        counts: of one run of `counted_tokens` tokens a lane.
        counts_of_half: of one run of half as many, rounded down: what a further token costs is the difference.
    """

    mode: str
    task: str
    lanes: int
    tokens: int
    seconds: float
    num_runs: int
    clocked_seconds: float
    clocked_tokens: int
    stage_seconds: dict[str, float]
    cpu_percent: float
    gpu_percent: float | None
    gpu_memory_bytes: int | None
    counts: Counts
    counts_of_half: Counts
    counted_tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.lanes * self.tokens / self.seconds

    def in_sequence(self, whole: float, half: float) -> float:
        """A count in the whole sequence, from those in the tokens counted and in half of them: each token beyond those
        is taken to cost as much as those of the second half did."""
        a_token = (whole - half) / (self.counted_tokens - self.counted_tokens // 2)
        return whole + a_token * (self.tokens - self.counted_tokens)

    @property
    def churned_megabytes(self) -> float:
        """Allocated on host and device in the whole sequence, 10^6 bytes."""
        return self.in_sequence(self.counts.churned_bytes, self.counts_of_half.churned_bytes) / 1e6

    @property
    def sequence_counts(self) -> dict[str, float | None]:
        """Every count in the whole sequence, but for the peak, which does not add up."""
        whole, half = asdict(self.counts), asdict(self.counts_of_half)
        return {
            key: None if whole[key] is None else self.in_sequence(whole[key], half[key])
            for key in whole
            if key != "python_peak_bytes"
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, derived numbers included."""
        return asdict(self) | {
            "tokens_per_second": self.tokens_per_second,
            "churned_megabytes": self.churned_megabytes,
            "sequence_counts": self.sequence_counts,
        }


def measure_mode(
    model: NeuroGen,
    mode: str,
    task: str,
    input_ids: Tensor,
    *,
    counted_tokens: int,
    clocked_tokens: int = 0,
    bf16: bool = False,
) -> ModeCost:
    """Warm up, time, clock by stage and count, each in runs of its own, so that no instrument is in another's figures.

    The clocked run launches its kernels one by one: there is no looking into a recorded step.

    Arguments:
        model: on its device; its weights are trained a few steps by the task `train`.
        mode: a mode's name.
        task: one of TASKS. `train` is the trainer's step from a new state, recorded as a CUDA graph where the trainer
            would record it; `generate` continues the first id by T tokens and reads them.
        input_ids: `[B, T + 1]` int64 on the model's device.
        counted_tokens: at most this many tokens are counted, since counting is slow; all of them in fused launches on a
            GPU.
        clocked_tokens: at most this many are clocked by stage where the mode goes token by token; 0 for all.
        bf16: run under torch.autocast in bfloat16.
    """
    model.set_mode(mode)
    device, num_tokens = model.device, input_ids.shape[1] - 1
    # A training step has its own: inside another, autocast keeps the weights it has cast from one step to the next.
    with precision(device, bf16=bf16 and task != "train"):
        work(model, task, input_ids[:, : WARM_UP_TOKENS + 1], bf16=bf16)()
        whole = work(model, task, input_ids, bf16=bf16)
        for _ in range(NUM_PLAIN_STEPS if can_replay(model, task) else 0):
            whole()
        seconds, usage = _timed(whole, device)
        num_clocked = min(num_tokens, clocked_tokens or num_tokens) if mode in TOKEN_BY_TOKEN else num_tokens
        clocked = work(model, task, input_ids[:, : num_clocked + 1], bf16=bf16, record=False)
        if can_replay(model, task):
            clocked()  # other block sizes of memory than the recorded step's
        with StageClock(device) as clock:
            clocked()
        # A fused sequence is the same launches whatever its length: all of it is counted, and nothing added in thought.
        counted = num_tokens if mode == "fused" and device.type == "cuda" else min(num_tokens, counted_tokens)
        counts, counts_of_half = (
            _count(model, task, input_ids[:, : length + 1], bf16=bf16) for length in (counted, counted // 2)
        )
    return ModeCost(
        mode=mode,
        task=task,
        lanes=input_ids.shape[0],
        tokens=num_tokens,
        seconds=statistics.median(seconds),
        num_runs=len(seconds),
        clocked_seconds=clock.total,
        clocked_tokens=num_clocked,
        stage_seconds=clock.seconds,
        cpu_percent=usage.cpu_percent,
        gpu_percent=usage.gpu_percent,
        gpu_memory_bytes=usage.gpu_memory_bytes,
        counts=counts,
        counts_of_half=counts_of_half,
        counted_tokens=counted,
    )


def work(
    model: NeuroGen, task: str, input_ids: Tensor, *, bf16: bool = False, record: bool = True
) -> Callable[[], object]:
    """The task as a function of nothing."""
    assert task in TASKS
    if task == "train":
        return _train_step(model, input_ids, bf16=bf16, record=record)
    prompt, num_new = input_ids[:, :1].cpu(), input_ids.shape[1] - 1
    return lambda: model.generate(prompt, max_new_tokens=num_new).replies()


def can_replay(model: NeuroGen, task: str) -> bool:
    """Whether the task is a recorded step, which is replayed after its first few runs."""
    return task == "train" and model.device.type == "cuda" and model.mode.name == "fused"


def _train_step(model: NeuroGen, input_ids: Tensor, *, bf16: bool, record: bool) -> Callable[[], object]:
    """One step of the trainer; the loss is read, which is its one synchronisation. Until then the host sleeps, as the
    trainer does where it waits for a step (`Pace`)."""
    width = next(model.parameters()).dtype
    arithmetic = Precision(model.device, "bfloat16" if bf16 else str(width).removeprefix("torch."))
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-3))
    update = Update(model, optimizer, clip_norm=1.0, precision=arithmetic)
    take = RecordedUpdate(update) if record and can_record(update) else update
    inputs, targets = input_ids[:, :-1].contiguous(), input_ids[:, 1:].contiguous()
    batch = Batch(
        inputs, targets, torch.zeros_like(inputs, dtype=torch.bool), np.full(inputs.shape[0], inputs.shape[1])
    )
    if model.device.type != "cuda":
        return lambda: float(take([batch], [None]).loss)
    read = torch.empty((), pin_memory=True)
    there = torch.cuda.Event(blocking=True)

    def step() -> float:
        read.copy_(take([batch], [None]).loss.detach(), non_blocking=True)
        there.record()
        there.synchronize()
        return float(read)

    return step


def _count(model: NeuroGen, task: str, input_ids: Tensor, *, bf16: bool) -> Counts:
    run = work(model, task, input_ids, bf16=bf16)
    for _ in range(NUM_PLAIN_STEPS + 1 if can_replay(model, task) else 0):
        run()
    return count(run, model.device)


def precision(device: torch.device, *, bf16: bool) -> AbstractContextManager[object]:
    # No context, rather than one that is off: inside either, autocast keeps cast weights until it is left.
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


def _timed(run: Callable[[], object], device: torch.device) -> tuple[list[float], UsageMeter]:
    seconds: list[float] = []
    with UsageMeter(device) as meter:
        while sum(seconds) < TIMED_SECONDS:
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return seconds, meter
