"""What a further token keeps for the reverse pass: activations, and no copy of a weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neurogen import NeuroGen
from neurogen.modes import TOKEN_BY_TOKEN


def saved_storages(model: NeuroGen, num_tokens: int) -> dict[int, tuple[int, torch.dtype]]:
    """Bytes and type of every storage that autograd keeps in a training step under autocast, by address."""
    storages: dict[int, tuple[int, torch.dtype]] = {}
    ids = torch.randint(model.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x.dtype
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, target_ids=ids).loss
    assert loss.requires_grad  # the graph, and with it every storage, is alive until here: no address came twice
    return storages


@pytest.mark.parametrize("config", [{}, {"memory_rule": "delta", "tie_embedding": True, "token_shift": 2}])
@pytest.mark.parametrize("trained", ["all", "first"])
@pytest.mark.parametrize("mode", TOKEN_BY_TOKEN)
def test_no_token_keeps_a_copy_of_a_weight(
    mode: str, trained: str, config: dict[str, Any], make_model: Callable[..., NeuroGen]
) -> None:
    model = make_model(dtype=torch.float32, mode=mode, vocab_size=5000, **config)
    if trained == "first":  # frozen weights are copied as well, and autocast keeps no cache of those
        model.requires_grad_(False)
        model.brain.wernicke[0].in_proj.weight.requires_grad_(True)
    few, many = (saved_storages(model, num_tokens) for num_tokens in (3, 7))
    a_token = (sum(size for size, _ in many.values()) - sum(size for size, _ in few.values())) / 4
    assert a_token < 2 * model.decoder.weight.numel() / 2, "half a rounded decoder"

    def num_copies(storages: dict[int, tuple[int, torch.dtype]], size: int) -> int:
        return sum(each == (size, torch.bfloat16) for each in storages.values())

    for name, weight in model.named_parameters():
        if name.endswith("proj.weight") or name == "decoder.weight":
            size = 2 * weight.numel()
            assert num_copies(many, size) == num_copies(few, size), name
