"""A few rows of a projection in full precision, whatever the type of what is projected."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.launch  # noqa: F401  before triton: it chooses the interpreter
from kernels.launch import check_launchable
from kernels.linear.beside import product_gradients, sum_gradient
from kernels.linear.columns import write_columns

_ROWS_MULTIPLE = 16  # products with fewer or odd numbers of rows are slow
_BLOCK_K = 128
_MANY_TOKENS = 8192
_NUM_PROGRAMS = 512  # wanted: with fewer tokens, several programs share the sum of a row
_FINISHED = 256  # numbers a program finishes


@triton.jit
def full_precision_kernel(
    h_ptr,  # [N, D]
    weight_ptr,  # [H, D] float32
    bias_ptr,  # [H] float32
    out_ptr,  # [SLICES, N, H] float32
    num_rows,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h W^T + b, or program_id(1)'s slice of that sum without b. A float32 weight is a sum of three numbers of half
    precision, to its last bit but one or two, and products of half-precision numbers are exact in the tensor cores. Not
    so their sums, which are cut off instead of rounded: they are kept to one block of channels, and blocks are added up
    outside."""
    i_slice = tl.program_id(1)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = tl.arange(0, BLOCK_H)
    o_k = i_slice * SLICE + tl.arange(0, BLOCK_K)
    half: tl.constexpr = h_ptr.dtype.element_ty
    b_out = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for k in range(0, SLICE, BLOCK_K):
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
            b_block = tl.dot(b_h, tl.trans(b_third))
            b_block = tl.dot(b_h, tl.trans(b_second), b_block)
            b_out += tl.dot(b_h, tl.trans(b_first), b_block)
    if SLICES == 1:
        b_out += tl.load(bias_ptr + o_h, mask=o_h < H, other=0.0)[None, :]
    mask = (o_n < num_rows)[:, None] & (o_h < H)[None, :]
    tl.store(out_ptr + (i_slice * num_rows + o_n)[:, None] * H + o_h[None, :], b_out, mask=mask)


@triton.jit
def finish_rows_kernel(
    slice_ptr,  # [SLICES, N, H] float32
    bias_ptr,  # [H] float32
    out_ptr,  # [N, H] float32
    size,  # N H
    H: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the slices, always in the same order, and the bias."""
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_i < size
    b_out = tl.load(slice_ptr + o_i, mask=mask, other=0.0)
    for i in tl.static_range(1, SLICES):
        b_out += tl.load(slice_ptr + i * size + o_i, mask=mask, other=0.0)
    b_out += tl.load(bias_ptr + o_i % H, mask=mask, other=0.0)
    tl.store(out_ptr + o_i, b_out, mask=mask)


def full_precision_rows(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h W^T + b in float32, in one launch, or in two where there are few rows; the gradient is the caller's.

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
    block_k = min(_BLOCK_K, max(16, triton.next_power_of_2(width)))
    num_tiles, num_blocks = triton.cdiv(num_rows, block_n), triton.cdiv(width, block_k)
    blocks_per_slice = triton.cdiv(num_blocks, max(1, _NUM_PROGRAMS // num_tiles))
    num_slices = triton.cdiv(num_blocks, blocks_per_slice)
    slices = out
    if num_slices > 1:
        slices = torch.empty(num_slices, num_rows, num_out, dtype=torch.float32, device=h.device)
    full_precision_kernel[(num_tiles, num_slices)](
        h,
        weight.contiguous(),
        bias,
        slices,
        num_rows,
        SLICE=blocks_per_slice * block_k,
        SLICES=num_slices,
        D=width,
        H=num_out,
        BLOCK_N=block_n,
        BLOCK_H=max(16, triton.next_power_of_2(num_out)),
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )
    if num_slices > 1:
        size = num_rows * num_out
        finish_rows_kernel[(triton.cdiv(size, _FINISHED),)](
            slices, bias, out, size, H=num_out, SLICES=num_slices, BLOCK=_FINISHED, num_warps=4
        )
    return out


class _FullPrecisionLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = h.reshape(-1, h.shape[-1])
        ctx.save_for_backward(rows, weight)
        ctx.weight, ctx.bias = weight, bias
        return full_precision_rows(rows, weight, bias).view(*h.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, weight = ctx.saved_tensors
        num_out, width = weight.shape
        padded = -(-num_out // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
        grad_rows = grad.reshape(-1, num_out)
        wide = torch.empty(rows.shape[0], padded, dtype=rows.dtype, device=rows.device)
        write_columns(wide, grad_rows)
        weights = torch.zeros(padded, width, dtype=rows.dtype, device=rows.device)
        weights[:num_out].copy_(weight)
        (grad_weight,) = product_gradients([ctx.weight], wide.t(), rows)
        return (wide @ weights).view(*grad.shape[:-1], width), grad_weight, sum_gradient(ctx.bias, grad_rows)


def full_precision_linear_fused(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`kernels.precision.full_precision_linear` without a float32 copy of h; gradients are made in h's type.

    Raises:
        ValueError: the tensors are not all on one device that fused kernels run on, or are float64.
    """
    check_launchable("full_precision_linear", h, weight, bias)
    return _FullPrecisionLinear.apply(h, weight, bias)
