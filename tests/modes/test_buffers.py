"""preallocated allocates nothing after the first token, in either direction."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from neurogen import NeuroGen
from neurogen.diagnosis.counters import count_device_allocations, count_host_allocations
from neurogen.modes.preallocated.sequence import make_room
from neurogen.modes.preallocated.steps import BrainSteps

CONFIGS = [
    {},
    {"memory_rule": "delta", "spike": "binary", "tie_embedding": True},
    {"lateral": False, "go_gate": False, "memory_rule": "delta"},
    {"token_shift": 3},
    {"spike": "smooth", "homeostasis": 0.0},
]


def allocations_of_later_tokens(model: NeuroGen, num_tokens: int, count: Callable[..., tuple[int, ...]]) -> list[Any]:
    """What tokens 1 to T - 1 allocate forward, and T - 2 to 0 in reverse."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (num_tokens, 2), generator=generator).to(model.device)
    starts = torch.rand(2, num_tokens, generator=generator).to(model.device) < 0.3
    kept = (~starts).t().to(model.embedding.weight.dtype)
    state = model.init_state(2)
    width = model.config.embedding_dim
    with torch.no_grad():
        room = make_room(model.brain, model.embedding.weight, 2, num_tokens, saved=True)
        steps = BrainSteps(room, model.brain, model.embedding.weight)
        x = torch.zeros(num_tokens, 2, width, dtype=room.dtype, device=room.device)
        steps.start(state)
        steps.relay.start_documents(starts)
        steps.forward(0, ids[0], x[0], kept[0])
        counts = [count(lambda: [steps.forward(t, ids[t], x[t], kept[t]) for t in range(1, num_tokens)])]
        steps.prepare_backward(steps.layer_states(num_tokens))
        grad_x = torch.randn_like(x)
        grad_go = torch.randn(num_tokens, 2, model.config.num_columns, dtype=room.dtype, device=room.device)
        steps.backward(num_tokens - 1, grad_x[-1], kept[-1], grad_go[-1])
        counts.append(
            count(lambda: [steps.backward(t, grad_x[t], kept[t], grad_go[t]) for t in reversed(range(num_tokens - 1))])
        )
    return counts


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token_of_a_training_sequence_allocates(
    config: dict[str, Any], dtype: torch.dtype, make_model: Callable[..., NeuroGen]
) -> None:
    model = make_model(dtype=dtype, **config)
    assert allocations_of_later_tokens(model, 4, count_host_allocations) == [(0, 0), (0, 0)]


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_a_longer_sequence_makes_no_more_allocations(
    config: dict[str, Any], make_model: Callable[..., NeuroGen]
) -> None:
    """The buffers are longer, not more; the loss is included. (Autograd's own count varies by its pool of threads.)"""
    model = make_model(dtype=torch.float32, mode="preallocated", **config)
    counts = []
    for num_tokens in (3, 9):
        ids = torch.zeros(2, num_tokens, dtype=torch.int64)

        def work(ids: torch.Tensor = ids) -> None:
            model.zero_grad(set_to_none=True)
            model(ids, target_ids=ids).loss.backward()

        work()
        counts.append(count_host_allocations(work)[0])
    assert counts[0] == counts[1]
    assert counts[0] > 0


@pytest.mark.parametrize("settings", [{}, {"do_sample": False}, {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.3}])
def test_no_generated_token_allocates(settings: dict[str, Any], make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(dtype=torch.float32, mode="preallocated")
    prompt = torch.zeros(2, 3, dtype=torch.int64)
    model.generate(prompt, max_new_tokens=2, **settings)
    few, many = (
        count_host_allocations(lambda n=n: model.generate(prompt, max_new_tokens=n, stop=(5,), **settings))
        for n in (4, 12)
    )
    assert few[0] == many[0]
    assert many[1] - few[1] == 8 * 2 * (8 + 4)  # the longer rows of tokens and log-probabilities alone


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_no_token_allocates_on_gpu(config: dict[str, Any], make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(dtype=torch.float32, **config).to("cuda")
    allocations_of_later_tokens(model, 4, count_device_allocations)  # cuBLAS makes its workspace once
    assert allocations_of_later_tokens(model, 4, count_device_allocations) == [(0, 0, 0), (0, 0, 0)]
