"""Residual addition and RMS normalisation in one pass over memory, forward and backward.

Backward needs the normalised rows, which their reader keeps anyway, and one number a row; the sums are not kept. It
writes the gradient twice where the delta has another type than the workspace: for the workspace and, rounded, for what
made the delta.
"""

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
    inverse_rms_ptr,
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
    tl.store(inverse_rms_ptr + o_r, b_inverse_rms, mask=o_r < num_rows)
    tl.store(normed_ptr + o_x, (b_total * b_inverse_rms[:, None]).to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_norm_backward_kernel(
    grad_total_ptr,
    grad_normed_ptr,
    normed_ptr,
    inverse_rms_ptr,
    grad_x_ptr,
    grad_delta_ptr,
    num_rows,
    D: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    HAS_GRAD_DELTA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
    o_x = o_r[:, None] * D + o_d[None, :]
    b_normed = tl.load(normed_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    b_grad = tl.load(grad_normed_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    b_inverse_rms = tl.load(inverse_rms_ptr + o_r, mask=o_r < num_rows, other=0.0)[:, None]
    b_grad = b_inverse_rms * (b_grad - b_normed * (tl.sum(b_grad * b_normed, axis=1) / D)[:, None])
    if HAS_GRAD_TOTAL:
        b_grad += tl.load(grad_total_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + o_x, b_grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if HAS_GRAD_DELTA:
        tl.store(grad_delta_ptr + o_x, b_grad.to(grad_delta_ptr.dtype.element_ty), mask=mask)


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
def add_norm_forward(
    x: Tensor, delta: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """total (empty without a delta), normed, and one over the root mean square of each row in float32."""
    x = x.contiguous()
    total = torch.empty(x.shape if delta is not None else (0,), dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    inverse_rms = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    delta = None if delta is None else delta.contiguous()
    num_rows = x.numel() // max(x.shape[-1], 1)
    _launch(
        add_norm_forward_kernel, x, x, delta, total, normed, inverse_rms, num_rows, eps, HAS_DELTA=delta is not None
    )
    return total, normed, inverse_rms


@add_norm_forward.register_fake
def _(x, delta, eps, out_dtype):  # type: ignore[no-untyped-def]
    total = x.new_empty(x.shape if delta is not None else (0,))
    return total, x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("neurogen::add_norm_backward", mutates_args=())
def add_norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    normed: Tensor,
    inverse_rms: Tensor,
    x_dtype: torch.dtype,
    delta_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradient of x, which is delta's too, in x's type; and in delta's type if that is another (else empty)."""
    normed, grad_normed = normed.contiguous(), grad_normed.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = torch.empty(normed.shape, dtype=x_dtype, device=normed.device)
    twice = delta_dtype != x_dtype
    grad_delta = torch.empty(normed.shape if twice else (0,), dtype=delta_dtype, device=normed.device)
    num_rows = normed.numel() // max(normed.shape[-1], 1)
    _launch(
        add_norm_backward_kernel,
        normed,
        grad_total,
        grad_normed,
        normed,
        inverse_rms,
        grad_x,
        grad_delta,
        num_rows,
        HAS_GRAD_TOTAL=grad_total is not None,
        HAS_GRAD_DELTA=twice,
    )
    return grad_x, grad_delta


@add_norm_backward.register_fake
def _(grad_total, grad_normed, normed, inverse_rms, x_dtype, delta_dtype):  # type: ignore[no-untyped-def]
    shape = normed.shape if delta_dtype != x_dtype else (0,)
    return normed.new_empty(normed.shape, dtype=x_dtype), normed.new_empty(shape, dtype=delta_dtype)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, delta, _, _ = inputs
    _, normed, inverse_rms = output
    ctx.x_dtype, ctx.delta_dtype = x.dtype, None if delta is None else delta.dtype
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(normed, inverse_rms)


def _backward(ctx, grad_total, grad_normed, _):  # type: ignore[no-untyped-def]
    normed, inverse_rms = ctx.saved_tensors
    if ctx.delta_dtype is None:
        if grad_normed is None:
            return None, None, None, None
        grad, _ = add_norm_backward(None, grad_normed, normed, inverse_rms, ctx.x_dtype, ctx.x_dtype)
        return grad, None, None, None
    if grad_normed is None:
        return grad_total, None if grad_total is None else grad_total.to(ctx.delta_dtype), None, None
    grad, grad_delta = add_norm_backward(grad_total, grad_normed, normed, inverse_rms, ctx.x_dtype, ctx.delta_dtype)
    return grad, grad_delta if ctx.delta_dtype != ctx.x_dtype else grad, None, None


add_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def add_norm_fused(
    x: Tensor, delta: Tensor | None = None, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`add_norm_reference` in one launch, backward in another; arguments and results as there.

    Raises:
        ValueError: the tensors are not all on one device that fused kernels run on, or are float64.
    """
    check_launchable("add_norm", x, delta)
    total, normed, _ = add_norm_forward(x, delta, eps, out_dtype or x.dtype)
    return x if delta is None else total, normed
