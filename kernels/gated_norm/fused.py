"""Gated norm in Triton: one launch forward, one backward; each reads its inputs and writes its outputs once."""

import kernels.launch  # noqa: F401, I001  before triton
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import sigmoid
from kernels.launch import check_launchable

BLOCK = 4096  # elements a program handles
NUM_WARPS = 4


def gated_norm_fused(
    x: Tensor, gate: Tensor, *, group_size: int, scale: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """y = rms_per_group(x) * silu(gate) * scale; shapes and meaning of `gated_norm_reference`.

    Views whose leading dimensions fold into one and whose last is contiguous, such as a part of a wide projection, are
    read in place. Raises ValueError for shapes that do not fit each other and for groups wider than 4096.
    """
    check_launchable("gated_norm", x, gate, scale)
    width = x.shape[-1]
    if group_size < 1 or group_size > BLOCK or width % group_size:
        raise ValueError(f"gated_norm: group_size is {group_size}; give a divisor of the width {width} up to {BLOCK}")
    if gate.shape != x.shape:
        raise ValueError(f"gated_norm: gate is {tuple(gate.shape)} and x {tuple(x.shape)}; give both one shape")
    groups = (*x.shape[:-1], width // group_size)
    if scale is not None and scale.shape != groups:
        raise ValueError(f"gated_norm: scale is {tuple(scale.shape)}; one factor a group is {groups}")
    if x.numel() == 0:
        return torch.zeros_like(x)
    return gated_norm_forward(x, gate, scale, group_size, eps)


@triton.jit
def gated_norm_forward_kernel(
    x_ptr,
    gate_ptr,
    scale_ptr,
    y_ptr,  # contiguous
    x_stride,
    gate_stride,
    scale_stride,
    num_groups,  # in all rows
    groups_per_row,
    eps,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,  # GROUP rounded up to a power of two
    NUM: tl.constexpr,  # groups a program handles
    HAS_SCALE: tl.constexpr,
):
    """y of NUM groups, whichever rows they are in."""
    i_group = tl.program_id(0).to(tl.int64) * NUM + tl.arange(0, NUM)
    is_group = i_group < num_groups
    row = i_group // groups_per_row
    in_row = i_group % groups_per_row
    channel = tl.arange(0, PADDED)
    mask = is_group[:, None] & (channel < GROUP)[None, :]
    column = in_row[:, None] * GROUP + channel[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row[:, None] * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 1) / GROUP + eps)
    if HAS_SCALE:
        factor *= tl.load(scale_ptr + row * scale_stride + in_row, mask=is_group, other=0.0).to(tl.float32)
    y = x * factor[:, None] * gate * sigmoid(gate)
    tl.store(y_ptr + i_group[:, None] * GROUP + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_norm_backward_kernel(
    x_ptr,
    gate_ptr,
    scale_ptr,
    y_grad_ptr,
    x_grad_ptr,  # contiguous
    gate_grad_ptr,
    scale_grad_ptr,  # contiguous
    x_stride,
    gate_stride,
    scale_stride,
    y_grad_stride,
    gate_grad_stride,
    num_groups,
    groups_per_row,
    eps,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    NUM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """Gradients of NUM groups."""
    i_group = tl.program_id(0).to(tl.int64) * NUM + tl.arange(0, NUM)
    is_group = i_group < num_groups
    row = i_group // groups_per_row
    in_row = i_group % groups_per_row
    channel = tl.arange(0, PADDED)
    mask = is_group[:, None] & (channel < GROUP)[None, :]
    column = in_row[:, None] * GROUP + channel[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row[:, None] * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    y_grad = tl.load(y_grad_ptr + row[:, None] * y_grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / GROUP + eps)
    normed = x * inverse_rms[:, None]
    opening = sigmoid(gate)
    passed = gate * opening * y_grad
    along = tl.sum(passed * normed, 1)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + row * scale_stride + in_row, mask=is_group, other=0.0).to(tl.float32)
        tl.store(scale_grad_ptr + i_group, along.to(scale_grad_ptr.dtype.element_ty), mask=is_group)
        inverse_rms *= scale
        y_grad *= scale[:, None]
    x_grad = inverse_rms[:, None] * (passed - normed * (along / GROUP)[:, None])
    gate_grad = y_grad * normed * opening * (1.0 + gate * (1.0 - opening))
    offsets = i_group[:, None] * GROUP + channel[None, :]
    tl.store(x_grad_ptr + offsets, x_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)
    gate_offsets = row[:, None] * gate_grad_stride + column
    tl.store(gate_grad_ptr + gate_offsets, gate_grad.to(gate_grad_ptr.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    """`[rows, width]` with a contiguous last dimension, a view where there is one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _blocks(x: Tensor, group_size: int) -> dict[str, int]:
    padded = triton.next_power_of_2(group_size)
    return {"GROUP": group_size, "PADDED": padded, "NUM": max(1, BLOCK // padded), "num_warps": NUM_WARPS}


def launch_forward(x: Tensor, gate: Tensor, scale: Tensor | None, group_size: int, eps: float) -> Tensor:
    """y `[..., D]`, contiguous, in x's type."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows, gate_rows = _rows(x), _rows(gate)
    scale_rows = x.new_empty(0, 0) if scale is None else _rows(scale)
    blocks = _blocks(x, group_size)
    num_groups = x.numel() // group_size
    gated_norm_forward_kernel[(triton.cdiv(num_groups, blocks["NUM"]),)](
        x_rows,
        gate_rows,
        scale_rows,
        y,
        x_rows.stride(0),
        gate_rows.stride(0),
        scale_rows.stride(0),
        num_groups,
        x.shape[-1] // group_size,
        eps,
        HAS_SCALE=scale is not None,
        **blocks,
    )
    return y


def launch_backward(
    x: Tensor,
    gate: Tensor,
    scale: Tensor | None,
    y_grad: Tensor,
    gate_grad: Tensor,
    group_size: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and scale (empty without one), contiguous; that of the gate is written to `gate_grad`, `[rows, D]`
    with a contiguous last dimension, which may be a part of wider rows."""
    x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale_grad = x.new_empty(0) if scale is None else torch.empty(scale.shape, dtype=scale.dtype, device=x.device)
    x_rows, gate_rows, y_grad_rows = _rows(x), _rows(gate), _rows(y_grad)
    scale_rows = x.new_empty(0, 0) if scale is None else _rows(scale)
    blocks = _blocks(x, group_size)
    num_groups = x.numel() // group_size
    gated_norm_backward_kernel[(triton.cdiv(num_groups, blocks["NUM"]),)](
        x_rows,
        gate_rows,
        scale_rows,
        y_grad_rows,
        x_grad,
        gate_grad,
        scale_grad,
        x_rows.stride(0),
        gate_rows.stride(0),
        scale_rows.stride(0),
        y_grad_rows.stride(0),
        gate_grad.stride(0),
        num_groups,
        x.shape[-1] // group_size,
        eps,
        HAS_SCALE=scale is not None,
        **blocks,
    )
    return x_grad, scale_grad


@torch.library.custom_op("neurogen::gated_norm_forward", mutates_args=())
def gated_norm_forward(x: Tensor, gate: Tensor, scale: Tensor | None, group_size: int, eps: float) -> Tensor:
    """y `[..., D]`, contiguous, in x's type."""
    return launch_forward(x, gate, scale, group_size, eps)


@gated_norm_forward.register_fake
def _(x, gate, scale, group_size, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("neurogen::gated_norm_backward", mutates_args=())
def gated_norm_backward(
    x: Tensor, gate: Tensor, scale: Tensor | None, y_grad: Tensor, group_size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and scale (empty without one), contiguous."""
    gate_grad = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    x_grad, scale_grad = launch_backward(x, gate, scale, y_grad, gate_grad.view(-1, gate.shape[-1]), group_size, eps)
    return x_grad, gate_grad, scale_grad


@gated_norm_backward.register_fake
def _(x, gate, scale, y_grad, group_size, eps):
    def like(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    return like(x), like(gate), x.new_empty(0) if scale is None else like(scale)


def _save_for_backward(ctx, inputs, output):
    x, gate, scale, group_size, eps = inputs
    ctx.save_for_backward(x, gate, scale)
    ctx.group_size, ctx.eps = group_size, eps


def _differentiate(ctx, y_grad):
    x, gate, scale = ctx.saved_tensors
    x_grad, gate_grad, scale_grad = gated_norm_backward(x, gate, scale, y_grad, ctx.group_size, ctx.eps)
    return x_grad, gate_grad, None if scale is None else scale_grad, None, None


gated_norm_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
