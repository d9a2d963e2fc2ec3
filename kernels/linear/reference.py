"""A projection in plain torch, and what a loop over tokens does about autocast's copies of its weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear.products import product

# By identity: each weight, so that the identity stays its own, and its rounded copy.
_Copies = dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]
_copies: _Copies | None = None  # of the loop that is running; a plain global, which torch.compile can trace


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b, with weight and bias of another type than x, float32 masters for instance, rounded to x's.

    Arguments:
        x: `[..., in]`.
        weight: W, `[out, in]`.
        bias: b, `[out]` or None.

    Returns:
        `[..., out]`; the product is torch's own, and under torch.autocast in autocast's type, but inside
        `one_copy_a_weight`.
    """
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    if _copies is not None and torch.is_grad_enabled():
        return _SharedCopyLinear.apply(x, weight, bias, _copy(_copies, weight, x.dtype))
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@contextlib.contextmanager
def one_copy_a_weight() -> Iterator[None]:
    """In here `linear` rounds a weight once, however often it is used, and its gradient is summed in the weight's type.

    For loops over tokens. A copy a token would be kept, all of them, for the reverse pass. The copy that torch.autocast
    caches is shared, but its gradient is in the copy's type, and so is the sum of as many terms as there are tokens: in
    bfloat16, over 500 tokens, that alone put gradients 2 to 4 % off.
    """
    global _copies
    before, _copies = _copies, {}
    try:
        yield
    finally:
        _copies = before


def _copy(copies: _Copies, weight: Tensor, dtype: torch.dtype) -> Tensor:
    key = id(weight), dtype
    if key not in copies:
        copies[key] = weight, weight.detach().to(dtype)
    return copies[key][1]


class _SharedCopyLinear(torch.autograd.Function):
    """Keeps x and the copy, which is every token's; the weight's gradient goes by the copy, straight to the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, copy: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, copy, None if bias is None else bias.to(copy.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, copy = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        grad_weight = product(rows.t(), x.flatten(0, -2), ctx.weight_dtype) if for_weight else None
        grad_bias = rows.sum(0, dtype=ctx.bias_dtype) if for_bias else None
        return grad @ copy if for_x else None, grad_weight, grad_bias, None
