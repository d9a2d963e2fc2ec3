"""SwiGLU with its projections: cuBLAS products, the activation's launches, and gradients summed in float32."""

from typing import Any

import torch
from torch import Tensor

import kernels.launch  # noqa: F401  before triton: it chooses the interpreter
from kernels.launch import check_launchable
from kernels.linear import RoundedWeights, product_gradients
from kernels.swiglu.fused import launch_backward, launch_forward


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, in_weight: Tensor, out_weight: Tensor, rounded_in: Tensor, rounded_out: Tensor
    ) -> Tensor:
        rows = h.reshape(-1, h.shape[-1])
        gate_and_value = rows @ rounded_in.t()
        hidden = launch_forward(gate_and_value)
        ctx.save_for_backward(rows, gate_and_value, hidden, rounded_in, rounded_out)
        ctx.weights = in_weight, out_weight
        return (hidden @ rounded_out.t()).view(h.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        rows, gate_and_value, hidden, rounded_in, rounded_out = ctx.saved_tensors
        in_weight, out_weight = ctx.weights
        grad_rows = grad_out.reshape(-1, grad_out.shape[-1])
        grad_hidden = grad_rows @ rounded_out
        (grad_out_weight,) = product_gradients([out_weight], grad_rows.t(), hidden)
        grad_in = launch_backward(grad_hidden, gate_and_value)
        (grad_in_weight,) = product_gradients([in_weight], grad_in.t(), rows)
        grad_h = (grad_in @ rounded_in).view(grad_out.shape)
        return grad_h, grad_in_weight, grad_out_weight, None, None


def mlp_fused(
    h: Tensor, in_weight: Tensor, out_weight: Tensor, *, rounded: tuple[RoundedWeights, RoundedWeights]
) -> Tensor:
    """`mlp_reference` with products in h's type, and weight gradients in the weights' own.

    Raises:
        ValueError: the tensors are not all on one device that fused kernels run on, or are float64.
    """
    check_launchable("mlp", h, in_weight, out_weight)
    copies = (store.get([weight], h.dtype) for store, weight in zip(rounded, (in_weight, out_weight)))
    return _MLP.apply(h, in_weight, out_weight, *copies)
