"""The bytes a fused step is said to keep, against those that autograd keeps and those that the GPU's allocator saw."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kernels.launch import INTERPRETED
from neurogen import BrainConfig, NeuroGen
from neurogen.config.schema import AdamWConfig
from neurogen.data import Batch
from neurogen.diagnosis.step_memory import fused_step_memory
from neurogen.training.optimizer import build_optimizer
from neurogen.training.precision import Precision
from neurogen.training.update import Update

CHUNK = 16  # of the memory in float32
SIZES = {"embedding_dim": 32, "column_width": 16, "head_width": 16, "pfc_depth": 2}


@pytest.mark.skipif(not INTERPRETED, reason="float32 and any sizes; on a GPU the allocator's peak is held to the count")
@pytest.mark.parametrize("settings", [{}, {"memory_rule": "delta", "go_gate": False}, {"broca_depth": 0}])
def test_activations_are_what_autograd_keeps(settings, make_model: Callable[..., NeuroGen]) -> None:
    lanes, num_tokens = 3, CHUNK  # neither is a width
    model = make_model(dtype=torch.float32, vocab_size=11, mode="fused", **SIZES | settings)
    ids = torch.randint(11, (lanes, num_tokens))
    per_token = {(lanes, num_tokens), (lanes * num_tokens,), (lanes * model.config.num_heads, num_tokens // CHUNK)}
    kept: dict[int, int] = {}  # bytes of a storage by its address, for what has a row a token

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and {tensor.shape[:1], tensor.shape[:2]} & per_token:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(ids, target_ids=ids)
    activations = sum(kept.values())
    count = fused_step_memory(model, lanes=lanes, num_tokens=num_tokens, dtype=torch.float32)
    assert activations == count.activations
    assert count.parameters == count.gradients == 4 * model.num_parameters() == count.optimizer // 2


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["hebbian", "delta"])
def test_a_step_takes_little_more_than_what_is_counted(rule: str) -> None:
    lanes, num_tokens = 16, 1024
    model = NeuroGen(BrainConfig(512, 64, 64, 1, 2, 2, 1, memory_rule=rule), vocab_size=8192, mode="fused")
    precision = Precision(torch.device("cuda"), "bfloat16")
    precision.place(model)
    update = Update(model, build_optimizer(model, AdamWConfig()), clip_norm=1.0, precision=precision)
    ids = torch.randint(8192, (lanes, num_tokens), device="cuda")
    batch = Batch(ids, ids, torch.zeros_like(ids).bool(), np.full(lanes, num_tokens))
    states = [model.init_state(lanes)]
    for _ in range(2):
        states = list(update([batch], states).states)
    torch.cuda.reset_peak_memory_stats()
    update([batch], states)
    count = fused_step_memory(model, lanes=lanes, num_tokens=num_tokens, dtype=torch.bfloat16)
    peak = torch.cuda.max_memory_allocated()
    assert count.total < peak <= 1.3 * count.total, f"{peak:,} of {count}"
