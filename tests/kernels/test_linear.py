"""The plain linear: its types, and what one copy of a weight does to the gradient of a loop over tokens."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import linear, one_copy_a_weight

NUM_TOKENS = 500


def gradients_of_a_loop(*, shared: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of x, weight and bias after a product a token under autocast, and the same in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_TOKENS, 2, 12, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(7, 12, generator=generator).bfloat16().float().requires_grad_()
    bias = torch.randn(7, generator=generator).bfloat16().float().requires_grad_()
    upstream = (1 + torch.randn(NUM_TOKENS, 2, 7, generator=generator)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16), one_copy_a_weight() if shared else contextlib.nullcontext():
        y = torch.stack([linear(x_t, weight, bias) for x_t in x.unbind()])
    y.backward(upstream)
    inputs = [z.detach().double().requires_grad_() for z in (x, weight, bias)]
    F.linear(*inputs).backward(upstream.double())
    got, expected = ([z.grad for z in each if z.grad is not None] for each in ((x, weight, bias), inputs))
    return got, expected


def test_gradients_over_many_tokens_are_summed_in_float32() -> None:
    got, expected = gradients_of_a_loop(shared=True)
    assert [z.dtype for z in got] == [torch.bfloat16, torch.float32, torch.float32]
    for z, exact in zip(got, expected):
        assert (z.double() - exact).norm() <= 4e-3 * exact.norm()


def test_a_sum_in_bfloat16_would_be_noticed() -> None:
    """What autocast does by itself, so that the test above is known to tell the two apart."""
    got, expected = gradients_of_a_loop(shared=False)
    assert (got[1].double() - expected[1]).norm() > 1e-2 * expected[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_type_is_torch_s_own_product(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype), torch.randn(4, dtype=dtype)
    with one_copy_a_weight():
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_master_is_rounded_to_the_inputs_type() -> None:
    x, weight, bias = torch.randn(2, 3, 5).bfloat16(), torch.randn(4, 5), torch.randn(4)
    expected = F.linear(x, weight.bfloat16(), bias.bfloat16())
    assert torch.equal(linear(x, weight, bias), expected)
    with one_copy_a_weight():
        assert torch.equal(linear(x, weight, bias), expected)


def test_a_copy_ends_with_its_context() -> None:
    """A weight that was changed between two sequences is rounded anew, and contexts may lie in each other."""
    x, weight = torch.ones(1, 2).bfloat16(), torch.ones(1, 2, requires_grad=True)
    with one_copy_a_weight():
        assert linear(x, weight).item() == 2
        with torch.no_grad():
            weight.add_(1)
        with one_copy_a_weight():
            assert linear(x, weight).item() == 4
        assert linear(x, weight).item() == 2
    assert linear(x, weight).item() == 4
