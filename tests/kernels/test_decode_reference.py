"""The decoder's definition against per-token loops written from its formula."""

import math

import pytest
import torch

from kernels.decode import IGNORE_INDEX, decode
from kernels.decode.reference import decode_reference


def make_inputs(*, num_tokens=12, width=6, vocab_size=9, ignored=0.3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64).to(dtype)
    target_ids = torch.randint(vocab_size, (num_tokens,), generator=generator)
    target_ids[torch.rand(num_tokens, generator=generator) < ignored] = IGNORE_INDEX
    return hidden, weight, target_ids


def decode_by_token(hidden, weight, target_ids):
    """Mean loss, hits and targets, in Python's floats."""
    total, num_correct, num_targets = 0.0, 0, 0
    for h, target in zip(hidden.tolist(), target_ids.tolist(), strict=True):
        if target == IGNORE_INDEX:
            continue
        logits = [sum(a * b for a, b in zip(row, h, strict=True)) for row in weight.tolist()]
        largest = max(logits)
        total += largest + math.log(sum(math.exp(z - largest) for z in logits)) - logits[target]
        num_correct += logits.index(largest) == target
        num_targets += 1
    return total / max(num_targets, 1), num_correct, num_targets


@pytest.mark.parametrize(("num_tokens", "ignored"), [(12, 0.0), (12, 0.3), (40, 0.3), (1, 0.0), (5, 1.0), (0, 0.0)])
def test_matches_loop_over_tokens(num_tokens, ignored):
    inputs = make_inputs(num_tokens=num_tokens, ignored=ignored)
    out = decode_reference(*inputs)
    loss, num_correct, num_targets = decode_by_token(*inputs)
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)
    assert (out.num_correct.item(), out.num_targets.item()) == (num_correct, num_targets)
    assert (out.num_correct.dtype, out.num_targets.dtype) == (torch.int64, torch.int64)


def test_right_answers_are_counted():
    out = decode_reference(5 * torch.eye(4), torch.eye(4), torch.tensor([0, 1, 3, 3]))
    assert out.num_correct.item() == 3


def test_tie_goes_to_the_lowest_id():
    hidden, weight = torch.ones(2, 3), torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 1, 1]])
    assert decode_reference(hidden, weight, torch.tensor([1, 2])).num_correct.item() == 1


def test_gradients():
    hidden, weight, target_ids = make_inputs(num_tokens=5, width=3, vocab_size=4)
    assert torch.autograd.gradcheck(
        lambda h, w: decode_reference(h, w, target_ids).loss, (hidden.requires_grad_(), weight.requires_grad_())
    )


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_to_predict_gives_no_loss_and_no_gradient(num_tokens, backend):
    hidden, weight, target_ids = make_inputs(num_tokens=num_tokens, ignored=1.0, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    out = decode(hidden, weight, target_ids, backend=backend)
    out.loss.backward()
    assert (out.loss.item(), out.num_correct.item(), out.num_targets.item()) == (0.0, 0, 0)
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_lanes_are_flattened():
    hidden, weight, target_ids = make_inputs()
    out = decode_reference(hidden.unflatten(0, (3, 4)), weight, target_ids.unflatten(0, (3, 4)))
    assert torch.equal(out.loss, decode_reference(hidden, weight, target_ids).loss)


def test_weight_of_another_type_is_rounded():
    hidden, weight, target_ids = make_inputs(dtype=torch.float32)
    out = decode_reference(hidden.bfloat16(), weight, target_ids)
    assert torch.equal(out.loss, decode_reference(hidden.bfloat16(), weight.bfloat16(), target_ids).loss)
