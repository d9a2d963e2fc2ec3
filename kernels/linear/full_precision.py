"""A few rows of a projection in full precision, whatever the type of what is projected."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.launch  # noqa: F401  before triton: it chooses the interpreter
from kernels.launch import check_launchable
from kernels.linear.products import product

_ROWS_MULTIPLE = 16  # products with fewer or odd numbers of rows are slow
_BLOCK_K = 128
_MANY_TOKENS = 8192


@triton.jit
def full_precision_kernel(
    h_ptr,  # [N, D]
    weight_ptr,  # [H, D] float32
    bias_ptr,  # [H] float32
    out_ptr,  # [N, H] float32
    num_rows,
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h W^T + b. A float32 weight is a sum of three numbers of half precision, to its last bit but one or two; products
    of half-precision numbers are exact in the tensor cores' float32 sums, so three of them lose nothing."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = tl.arange(0, BLOCK_H)
    o_k = tl.arange(0, BLOCK_K)
    half: tl.constexpr = h_ptr.dtype.element_ty
    b_out = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for k in range(0, D, BLOCK_K):
        inside = (k + o_k < D)[None, :]
        b_h = tl.load(h_ptr + o_n[:, None] * D + (k + o_k)[None, :], mask=(o_n < num_rows)[:, None] & inside, other=0.0)
        b_w = tl.load(weight_ptr + o_h[:, None] * D + (k + o_k)[None, :], mask=(o_h < H)[:, None] & inside, other=0.0)
        if half == tl.float32:
            b_out = tl.dot(b_h, tl.trans(b_w), b_out, input_precision="ieee")
        else:
            b_first = b_w.to(half)
            b_rest = b_w - b_first.to(tl.float32)
            b_second = b_rest.to(half)
            b_third = (b_rest - b_second.to(tl.float32)).to(half)
            b_out = tl.dot(b_h, tl.trans(b_third), b_out)
            b_out = tl.dot(b_h, tl.trans(b_second), b_out)
            b_out = tl.dot(b_h, tl.trans(b_first), b_out)
    b_bias = tl.load(bias_ptr + o_h, mask=o_h < H, other=0.0)
    mask = (o_n < num_rows)[:, None] & (o_h < H)[None, :]
    tl.store(out_ptr + o_n[:, None] * H + o_h[None, :], b_out + b_bias[None, :], mask=mask)


def full_precision_rows(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h W^T + b in float32, in one launch; the gradient is the caller's.

    Arguments:
        h: `[N, D]`, contiguous, float32 or half precision.
        weight: `[H, D]` float32, H at most a few dozen. bias: `[H]` float32.
    """
    num_rows, width = h.shape
    num_out = weight.shape[0]
    out = torch.empty(num_rows, num_out, dtype=torch.float32, device=h.device)
    if num_rows == 0:
        return out
    block_n = 64 if num_rows >= _MANY_TOKENS else 16
    full_precision_kernel[(triton.cdiv(num_rows, block_n),)](
        h,
        weight.contiguous(),
        bias,
        out,
        num_rows,
        D=width,
        H=num_out,
        BLOCK_N=block_n,
        BLOCK_H=max(16, triton.next_power_of_2(num_out)),
        BLOCK_K=min(_BLOCK_K, max(16, triton.next_power_of_2(width))),
        num_warps=4,
        num_stages=3,
    )
    return out


class _FullPrecisionLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = h.reshape(-1, h.shape[-1])
        ctx.save_for_backward(rows, weight)
        return full_precision_rows(rows, weight, bias).view(*h.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grads
        rows, weight = ctx.saved_tensors
        num_out, width = weight.shape
        padded = -(-num_out // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
        wide = torch.zeros(rows.shape[0], padded, dtype=rows.dtype, device=rows.device)
        wide[:, :num_out].copy_(grad.reshape(-1, num_out))
        weights = torch.zeros(padded, width, dtype=rows.dtype, device=rows.device)
        weights[:num_out].copy_(weight)
        grad_weight = product(wide.t(), rows, weight.dtype)[:num_out]
        return (wide @ weights).view(*grad.shape[:-1], width), grad_weight, grad.reshape(-1, num_out).sum(0)


def full_precision_linear_fused(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`kernels.precision.full_precision_linear` without a float32 copy of h; gradients are made in h's type.

    Raises:
        ValueError: the tensors are not all on one device that fused kernels run on, or are float64.
    """
    check_launchable("full_precision_linear", h, weight, bias)
    return _FullPrecisionLinear.apply(h, weight, bias)
