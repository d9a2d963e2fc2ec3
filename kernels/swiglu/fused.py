"""SwiGLU's activation in one pass over memory, forward and backward; the backward pass needs nothing but the input."""

import kernels.launch  # noqa: F401, I001  before triton: it chooses the interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import check_launchable

_BLOCK = 2048


@triton.jit
def swiglu_forward_kernel(input_ptr, out_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < F
    b_gate = tl.load(input_ptr + row * 2 * F + offsets, mask=mask).to(tl.float32)
    b_value = tl.load(input_ptr + row * 2 * F + F + offsets, mask=mask).to(tl.float32)
    b_out = b_gate / (1.0 + tl.exp(-b_gate)) * b_value
    tl.store(out_ptr + row * F + offsets, b_out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(grad_out_ptr, input_ptr, grad_input_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < F
    b_gate = tl.load(input_ptr + row * 2 * F + offsets, mask=mask).to(tl.float32)
    b_value = tl.load(input_ptr + row * 2 * F + F + offsets, mask=mask).to(tl.float32)
    b_grad = tl.load(grad_out_ptr + row * F + offsets, mask=mask).to(tl.float32)
    b_sigmoid = 1.0 / (1.0 + tl.exp(-b_gate))
    b_grad_gate = b_grad * b_value * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
    b_grad_value = b_grad * b_gate * b_sigmoid
    p_grad = grad_input_ptr + row * 2 * F + offsets
    tl.store(p_grad, b_grad_gate.to(grad_input_ptr.dtype.element_ty), mask=mask)
    tl.store(p_grad + F, b_grad_value.to(grad_input_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: triton.JITFunction, *tensors: Tensor, width: int, num_rows: int) -> None:
    if num_rows * width == 0:
        return
    block = min(_BLOCK, triton.next_power_of_2(width))
    kernel[(num_rows, triton.cdiv(width, block))](*tensors, F=width, BLOCK=block, num_warps=max(block // 256, 1))


def launch_forward(gate_and_value: Tensor) -> Tensor:
    """`[..., 2F]` to `[..., F]`."""
    width = gate_and_value.shape[-1] // 2
    shape = (*gate_and_value.shape[:-1], width)
    out = torch.empty(shape, dtype=gate_and_value.dtype, device=gate_and_value.device)
    num_rows = out.numel() // max(width, 1)
    _launch(swiglu_forward_kernel, gate_and_value.contiguous(), out, width=width, num_rows=num_rows)
    return out


@torch.library.custom_op("neurogen::swiglu_forward", mutates_args=())
def swiglu_forward(gate_and_value: Tensor) -> Tensor:
    """`[..., 2F]` to `[..., F]`; see `swiglu_fused`."""
    return launch_forward(gate_and_value)


@swiglu_forward.register_fake
def _(gate_and_value):  # type: ignore[no-untyped-def]
    return gate_and_value.new_empty((*gate_and_value.shape[:-1], gate_and_value.shape[-1] // 2))


def launch_backward(grad_out: Tensor, gate_and_value: Tensor) -> Tensor:
    """Gradient `[..., 2F]` from `[..., F]`."""
    grad_out, gate_and_value = grad_out.contiguous(), gate_and_value.contiguous()
    grad_input = torch.empty(gate_and_value.shape, dtype=gate_and_value.dtype, device=gate_and_value.device)
    width = grad_out.shape[-1]
    num_rows = grad_out.numel() // max(width, 1)
    _launch(swiglu_backward_kernel, grad_out, gate_and_value, grad_input, width=width, num_rows=num_rows)
    return grad_input


@torch.library.custom_op("neurogen::swiglu_backward", mutates_args=())
def swiglu_backward(grad_out: Tensor, gate_and_value: Tensor) -> Tensor:
    """Gradient `[..., 2F]` from `[..., F]`."""
    return launch_backward(grad_out, gate_and_value)


@swiglu_backward.register_fake
def _(grad_out, gate_and_value):  # type: ignore[no-untyped-def]
    return gate_and_value.new_empty(gate_and_value.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):  # type: ignore[no-untyped-def]
    return swiglu_backward(grad_out, *ctx.saved_tensors)


swiglu_forward.register_autograd(_backward, setup_context=_setup_context)


def swiglu_fused(gate_and_value: Tensor) -> Tensor:
    """`swiglu_reference` in one launch, backward in another; argument and result as there.

    Raises:
        ValueError: the last dimension is odd, or the tensor is float64 or not on a device that fused kernels run on.
    """
    check_launchable("swiglu", gate_and_value)
    if gate_and_value.shape[-1] % 2:
        raise ValueError(
            f"swiglu: the last dimension is {gate_and_value.shape[-1]}; it must hold as many gates as values"
        )
    return swiglu_forward(gate_and_value)
