"""The training suite: whole train steps of ours, mode by mode, and of a compiled GPT of equal parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from neurogen.baselines import GPT, GPTConfig
from neurogen.benchmark.harness import Contender
from neurogen.benchmark.kernels import Case
from neurogen.brain import BrainConfig, BrainState
from neurogen.config.schema import AdamWConfig
from neurogen.data import Batch
from neurogen.model import NeuroGen
from neurogen.models import LanguageModel
from neurogen.training.optimizer import build_optimizer
from neurogen.training.precision import Precision
from neurogen.training.put_off import Overlap
from neurogen.training.recorded import NUM_PLAIN_STEPS, RecordedUpdate
from neurogen.training.update import Update


@dataclass(frozen=True)
class Workload:
    """A model size and a batch; `gpt` has about as many parameters. `alone`: timed in its fastest mode only."""

    name: str
    brain: BrainConfig
    gpt: GPTConfig
    vocab_size: int
    lanes: int
    tokens: int
    alone: bool = False


def workloads(*, small: bool) -> Iterator[Workload]:
    """The shapes of the published targets, or with `small` one that a CPU can do, to test the suite itself."""
    if small:
        yield Workload("test", BrainConfig(32, 16, 16), GPTConfig(32, 2, 16), 67, 2, 6)
        return
    base = BrainConfig(1536, 128, 128, 1, 2, 2, 1)
    small_brain = BrainConfig(512, 64, 64, 1, 2, 2, 1)
    gpt_base, gpt_small = GPTConfig(1536, 6, 128), GPTConfig(512, 6, 64)
    yield Workload("base", base, gpt_base, 50257, 32, 1024)
    yield Workload("base, one sequence", base, gpt_base, 50257, 1, 500)
    yield Workload("small", small_brain, gpt_small, 257, 64, 512)
    # What parts of the brain that do not lower the loss (docs/LOG.md) cost in time.
    yield Workload(
        "small, no lateral weights", replace(small_brain, lateral=False), gpt_small, 257, 64, 512, alone=True
    )
    yield Workload("small, no Go gate", replace(small_brain, go_gate=False), gpt_small, 257, 64, 512, alone=True)


def _machine_cases(dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """The two rates that a step is measured against: a large matrix product, and a copy from memory to memory."""
    size = 64 if small else 8192

    def multiply(device: torch.device) -> Callable[[], Any]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b

    def copy(device: torch.device) -> Callable[[], Any]:
        x = torch.randn(size * size * (1 if small else 16), device=device)
        y = torch.empty_like(x)
        return lambda: y.copy_(x)

    num_bytes = 2 * 4 * size * size * (1 if small else 16)
    rate = Contender("torch", multiply, extra=lambda seconds: {"model_tflops": 2 * size**3 / seconds / 1e12})
    yield Case("matrix product", {"M": size, "N": size, "K": size}, dtype, [rate], lambda seconds: {}, min_rounds=100)
    rate = Contender("torch", copy, extra=lambda seconds: {"copy_rate": num_bytes / seconds})
    yield Case("copy", {"bytes": num_bytes // 2}, torch.float32, [rate], lambda seconds: {})


def cases(*, small: bool) -> Iterator[Case]:
    dtype = torch.float32 if small else torch.bfloat16
    yield from _machine_cases(dtype, small=small)
    for work in workloads(small=small):
        tokens = work.lanes * work.tokens
        flops = NeuroGen(work.brain, vocab_size=work.vocab_size).flops_per_token() * tokens
        contenders = [
            Contender(f"neurogen {mode}{', CUDA graph' if graph else ''}", _brain_step(work, mode, dtype, graph=graph))
            for mode, graph in (("fused", True), ("fused", False), ("unfused", False))
        ]
        half = _brain_step(work, "fused", dtype, graph=True, moments="bfloat16")
        contenders.append(Contender("neurogen fused, CUDA graph, bfloat16 moments", half))
        for name, moments in (("", "float32"), (", bfloat16 moments", "bfloat16")):
            overlapped = _brain_step(work, "fused", dtype, graph=True, moments=moments, overlap=Overlap())
            contenders.append(Contender(f"neurogen fused, CUDA graph, update overlapped{name}", overlapped))
        contenders.append(Contender("GPT, torch.compile", _gpt_step(work, dtype)))
        if work.alone:
            contenders = contenders[:1]
        yield Case(
            f"train step, {work.name}",
            {"B": work.lanes, "T": work.tokens, "D": work.brain.embedding_dim, "V": work.vocab_size},
            dtype,
            contenders,
            _rates(tokens, flops),
        )


def _rates(tokens: int, flops: int) -> Callable[[float], dict[str, float]]:
    # The FLOPs are our model's: for the GPT's row only tokens per second mean something.
    return lambda seconds: {"tokens_per_second": tokens / seconds, "model_tflops": flops / seconds / 1e12}


def _brain_step(
    work: Workload,
    mode: str,
    dtype: torch.dtype,
    *,
    graph: bool,
    moments: str = "float32",
    overlap: Overlap | None = None,
) -> Callable[[torch.device], Callable[[], Any]]:
    def prepare(device: torch.device) -> Callable[[], Any]:
        torch.manual_seed(0)
        model = NeuroGen(work.brain, vocab_size=work.vocab_size, mode=mode)
        return _trainer_step(model, work, device, dtype, graph=graph, moments=moments, overlap=overlap)

    return prepare


def _gpt_step(work: Workload, dtype: torch.dtype) -> Callable[[torch.device], Callable[[], Any]]:
    def prepare(device: torch.device) -> Callable[[], Any]:
        torch.manual_seed(0)
        model = GPT(work.gpt, vocab_size=work.vocab_size, mask_documents=False)
        return _trainer_step(model, work, device, dtype, graph=False)

    return prepare


def _trainer_step(
    model: LanguageModel,
    work: Workload,
    device: torch.device,
    dtype: torch.dtype,
    *,
    graph: bool,
    moments: str = "float32",
    overlap: Overlap | None = None,
) -> Callable[[], None]:
    """The trainer's own step (forward, backward, clipping, guard, AdamW) on one batch, the state carried on."""
    precision = Precision(device, str(dtype).removeprefix("torch."))
    precision.place(model)
    optimizer = build_optimizer(model, AdamWConfig(moments=moments))
    optimizer.set_rate_scale(0.0)  # the batch stays as hard as it was
    update = Update(model, optimizer, clip_norm=1.0, precision=precision)
    take = RecordedUpdate(update, overlap=overlap) if graph else update
    ids = torch.randint(0, work.vocab_size, (work.lanes, work.tokens + 1), device=device)
    counts = np.full(work.lanes, work.tokens)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.zeros_like(ids[:, 1:]).bool(), counts)
    states: list[BrainState | None] = [model.init_state(work.lanes)]

    def step() -> None:
        states[:] = take([batch], states).states

    if graph:
        for _ in range(NUM_PLAIN_STEPS):
            step()
    return step
