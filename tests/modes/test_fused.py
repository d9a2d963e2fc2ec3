"""Fused against unfused, whole models, in Triton's interpreter where there is no GPU."""

import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from kernels.launch import INTERPRETED
from neurogen import BrainConfig, BrainState, NeuroGen
from neurogen.diagnosis.counters import count_runtime_calls

SIZES = {"embedding_dim": 16, "column_width": 16, "head_width": 16, "chunk_size": 16}


def everything(model: NeuroGen, mode: str, state: BrainState, ids: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """Loss, counts, next state, health, and the gradients of weights and of the state."""
    model.set_mode(mode)
    model.zero_grad()
    state = state.map(lambda x: x.detach().clone().requires_grad_() if x.is_floating_point() else x)
    out = model(ids, state, document_start=starts, target_ids=ids.roll(-1, 1))
    total = out.loss + sum(x.square().sum() for x in out.state.tensors().values() if x.is_floating_point())
    total.backward()
    results = {"loss": out.loss, "num_correct": out.num_correct, "num_targets": out.num_targets}
    results |= {f"state {name}": x for name, x in out.state.tensors().items()} | out.health
    results |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    results |= {f"gradient of initial {n}": x.grad for n, x in state.tensors().items() if x.is_floating_point()}
    return {name: x.detach().double() for name, x in results.items()}


SMOOTH = {"spike": "smooth", "threshold": 0.0, "adaptation_strength": 0.0, "homeostasis": 0.0}


@pytest.mark.skipif(not INTERPRETED, reason="tests/modes/test_agreement.py compares on a GPU, in bfloat16")
@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"memory_rule": "hebbian"}, (3, 7)),
        ({"memory_rule": "delta", "tie_embedding": True}, (3, 7)),
        ({"memory_rule": "delta", "spike": "binary"}, (2, 1)),
        ({"memory_rule": "hebbian", "wernicke_depth": 2, "lateral": False}, (1, 18)),  # over the edge of a chunk
        ({**SMOOTH, "hippocampus_depth": 0, "pfc_depth": 0}, (3, 7)),
    ],
)
def test_fused_agrees_with_unfused(settings, shape, make_model: Callable[..., NeuroGen]):
    model = make_model(dtype=torch.float32, vocab_size=19, **SIZES, **settings)
    ids = torch.randint(19, shape, generator=torch.Generator().manual_seed(0))
    starts = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.15
    with torch.no_grad():
        state = model(ids.flip(1)).state
    expected = everything(model, "unfused", state, ids, starts)
    for name, got in everything(model, "fused", state, ids, starts).items():
        error = float((got - expected[name]).norm() / expected[name].norm().clamp_min(1e-6))
        assert error <= 1e-4, f"{name}: {error}"


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that fills with the name of every kernel the interpreter launches from now on."""
    launched: list[str] = []
    run = GridExecutor.__call__

    def count(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    return launched


@pytest.mark.skipif(not INTERPRETED, reason="counts launches in the interpreter; the profiler counts them on a GPU")
def test_launches_do_not_grow_with_the_sequence(make_model: Callable[..., NeuroGen], monkeypatch: pytest.MonkeyPatch):
    launched = count_launches(monkeypatch)
    model = make_model(dtype=torch.float32, mode="fused", **SIZES)
    counts = []
    for num_tokens in (1, 2, 18):  # within a chunk of the memory, and over its edge
        ids = torch.zeros(1, num_tokens, dtype=torch.int64)
        model(ids, target_ids=ids).loss.backward()
        counts.append(len(launched))
        launched.clear()
    assert counts[0] == counts[1] == counts[2] > 0


# What runs inside a product is cuBLAS's choice by shape: one kernel, or one and the sum of its parts.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
INSIDE_PRODUCTS = re.compile(r"nvjet|gemm|gemv|cutlass|cublas|splitK|memset", re.IGNORECASE)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_lanes", "lengths"), [(1, (128, 4096)), (32, (512, 4096))])
def test_a_steps_launches_and_waits_do_not_grow_on_a_gpu(num_lanes: int, lengths: tuple[int, int]) -> None:
    """Few ids are sorted in one launch and many by torch's sort, so lanes and lengths are on one side of that."""
    brain = BrainConfig(embedding_dim=64, column_width=32, head_width=32)
    model = NeuroGen(brain, vocab_size=257, mode="fused").to("cuda")
    model.set_optimizer(torch.optim.AdamW(model.parameters(), fused=True))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    counts, waits = [], []
    for num_tokens in lengths:
        ids = torch.randint(257, (num_lanes, num_tokens), device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model.train_step(ids, ids)
            with torch.profiler.profile(activities=activities) as profiler:
                model.train_step(ids, ids)
                torch.cuda.synchronize()
            waits.append(count_runtime_calls(lambda ids=ids: model.train_step(ids, ids))[1])
        on_gpu = [event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events()]
        launches = Counter(x.name for x, there in zip(profiler.events(), on_gpu) if there)
        products = Counter(x.name for x, there in zip(profiler.events(), on_gpu) if not there and x.name in PRODUCTS)
        others = Counter({name: n for name, n in launches.items() if not INSIDE_PRODUCTS.search(name)})
        counts.append((products, others))
    assert counts[0][0] == counts[1][0]
    # By number, not by name: torch chooses another kernel for another shape.
    first, second = counts[0][1], counts[1][1]
    assert first.total() == second.total() > 50, (first - second, second - first)
    assert waits == [1, 1]


@pytest.mark.gpu
def test_a_reply_is_waited_for_once() -> None:
    brain = BrainConfig(embedding_dim=64, column_width=32, head_width=32)
    model = NeuroGen(brain, vocab_size=257, mode="fused").to("cuda")
    prompt = torch.zeros(1, 4, dtype=torch.int64)
    for num_tokens in (4, 64):
        for _ in range(2):  # a model's weights are packed in its first two replies, and then kept
            model.generate(prompt, max_new_tokens=num_tokens).replies()
        _, waits = count_runtime_calls(lambda n=num_tokens: model.generate(prompt, max_new_tokens=n).replies())
        assert waits == 1


@pytest.mark.skipif(not INTERPRETED, reason="tests/generation/test_launch.py compares on a GPU")
def test_generates_the_same_tokens(make_model: Callable[..., NeuroGen]):
    model = make_model(dtype=torch.float32, vocab_size=19, **SIZES)
    prompt = torch.tensor([[1, 5, 2], [0, 7, 7]])
    settings = {"max_new_tokens": 3, "seed": 4, "temperature": 1.3, "top_k": 12, "top_p": 0.95, "min_p": 0.01}
    expected = model.generate(prompt, **settings)
    model.set_mode("fused")
    got = model.generate(prompt, **settings)
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.log_probs, expected.log_probs, rtol=0, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="tests/generation/test_launch.py counts launches by the profiler on a GPU")
def test_launches_of_a_reply_do_not_grow_with_its_length(
    make_model: Callable[..., NeuroGen], monkeypatch: pytest.MonkeyPatch
):
    launched = count_launches(monkeypatch)
    model = make_model(dtype=torch.float32, vocab_size=19, mode="fused", **SIZES)
    counts = []
    for max_new_tokens in (1, 3):
        out = model.generate(torch.tensor([[1, 5, 2]]), max_new_tokens=max_new_tokens, seed=4)
        assert out.lengths.tolist() == [max_new_tokens]
        counts.append(Counter(launched))
        launched.clear()
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 1, "the prompt's launches and the reply's"
