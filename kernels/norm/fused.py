"""Residual addition and RMS normalisation in one pass over memory, forward and backward."""

import kernels.launch  # noqa: F401, I001  before triton: it chooses the interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import check_launchable

_ELEMENTS = 4096  # numbers a program works on: one wide row or several narrow ones


@triton.jit
def add_norm_forward_kernel(
    x_ptr,
    delta_ptr,
    total_ptr,
    normed_ptr,
    num_rows,
    eps,
    D: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
    o_x = o_r[:, None] * D + o_d[None, :]
    b_total = tl.load(x_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        b_total += tl.load(delta_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
        tl.store(total_ptr + o_x, b_total.to(total_ptr.dtype.element_ty), mask=mask)
    b_inverse_rms = tl.rsqrt(tl.sum(b_total * b_total, axis=1) / D + eps)
    tl.store(normed_ptr + o_x, (b_total * b_inverse_rms[:, None]).to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_norm_backward_kernel(
    grad_total_ptr,
    grad_normed_ptr,
    total_ptr,
    grad_x_ptr,
    num_rows,
    eps,
    D: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
    o_x = o_r[:, None] * D + o_d[None, :]
    b_total = tl.load(total_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    b_inverse_rms = tl.rsqrt(tl.sum(b_total * b_total, axis=1) / D + eps)[:, None]
    b_normed = b_total * b_inverse_rms
    b_grad = tl.load(grad_normed_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    b_grad = b_inverse_rms * (b_grad - b_normed * (tl.sum(b_grad * b_normed, axis=1) / D)[:, None])
    if HAS_GRAD_TOTAL:
        b_grad += tl.load(grad_total_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + o_x, b_grad.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: triton.JITFunction, rows: Tensor, *arguments: object, **constants: object) -> None:
    width = rows.shape[-1]
    num_rows = rows.numel() // max(width, 1)
    if num_rows == 0:
        return
    block_d = triton.next_power_of_2(width)
    block_r = max(min(_ELEMENTS // block_d, triton.next_power_of_2(num_rows)), 1)
    kernel[(triton.cdiv(num_rows, block_r),)](
        *arguments,
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=min(max(block_r * block_d // 512, 1), 16),
        **constants,
    )


@torch.library.custom_op("neurogen::add_norm_forward", mutates_args=())
def add_norm_forward(x: Tensor, delta: Tensor | None, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """total (empty without a delta) and normed; see `add_norm_fused`."""
    x = x.contiguous()
    total = torch.empty(x.shape if delta is not None else (0,), dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    delta = None if delta is None else delta.contiguous()
    num_rows = x.numel() // max(x.shape[-1], 1)
    _launch(add_norm_forward_kernel, x, x, delta, total, normed, num_rows, eps, HAS_DELTA=delta is not None)
    return total, normed


@add_norm_forward.register_fake
def _(x, delta, eps, out_dtype):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape if delta is not None else (0,)), x.new_empty(x.shape, dtype=out_dtype)


@torch.library.custom_op("neurogen::add_norm_backward", mutates_args=())
def add_norm_backward(grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, eps: float) -> Tensor:
    """Gradient of x, which is delta's too."""
    total, grad_normed = total.contiguous(), grad_normed.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    num_rows = total.numel() // max(total.shape[-1], 1)
    _launch(
        add_norm_backward_kernel,
        total,
        grad_total,
        grad_normed,
        total,
        grad_x,
        num_rows,
        eps,
        HAS_GRAD_TOTAL=grad_total is not None,
    )
    return grad_x


@add_norm_backward.register_fake
def _(grad_total, grad_normed, total, eps):  # type: ignore[no-untyped-def]
    return total.new_empty(total.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, delta, ctx.eps, _ = inputs
    ctx.delta_dtype = None if delta is None else delta.dtype
    ctx.save_for_backward(x if delta is None else output[0])


def _backward(ctx, grad_total, grad_normed):  # type: ignore[no-untyped-def]
    (total,) = ctx.saved_tensors
    if ctx.delta_dtype is None:
        return add_norm_backward(None, grad_normed, total, ctx.eps), None, None, None
    grad = add_norm_backward(grad_total, grad_normed, total, ctx.eps)
    return grad, grad.to(ctx.delta_dtype), None, None


add_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def add_norm_fused(
    x: Tensor, delta: Tensor | None = None, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`add_norm_reference` in one launch, backward in another; arguments and results as there.

    Raises:
        ValueError: the tensors are not all on one device that fused kernels run on, or are float64.
    """
    check_launchable("add_norm", x, delta)
    total, normed = add_norm_forward(x, delta, eps, out_dtype or x.dtype)
    return x if delta is None else total, normed
