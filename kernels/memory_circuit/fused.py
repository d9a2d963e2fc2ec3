"""A fast-weight layer's circuit: two cuBLAS products around the memory's launches, and a backward pass by hand.

Gradients of queries, keys, values, gates and of the few forget and write logits are written side by side into one
matrix, whose product with the weights carries all of them to the workspace, and with the workspace to the weights.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels.launch  # noqa: F401  before triton: it chooses the interpreter
from kernels.gated_norm import fused as gated_norm
from kernels.launch import check_launchable
from kernels.linear import RoundedWeights, idle_gpu, product_gradients, sum_gradient
from kernels.linear.columns import write_columns
from kernels.linear.full_precision import full_precision_rows
from kernels.memory.fused import WIDTHS, memory_backward_into, memory_forward
from kernels.memory.reference import RULES

_ROWS_MULTIPLE = 64  # the logits' rows below the four projections are padded to this, for the products' alignment


class _Options(NamedTuple):
    eps: float
    recorded: bool  # whether there will be a backward pass


class _MemoryCircuit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        in_projection: Tensor,
        forget: Tensor,
        forget_bias: Tensor,
        write: Tensor | None,
        write_bias: Tensor | None,
        out_projection: Tensor,
        state: Tensor,
        document_start: Tensor | None,
        rounded_in: Tensor,
        rounded_out: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        width, num_heads = h.shape[-1], forget.shape[0]
        rows = h.reshape(-1, width)
        projected = rows @ rounded_in[: 4 * width].t()
        query, key, value, gate = _parts(projected.view(*h.shape[:2], -1), num_heads)
        logits = [
            full_precision_rows(rows, weight, bias).view(*h.shape[:2], num_heads)
            for weight, bias in ((forget, forget_bias), (write, write_bias))
            if weight is not None and bias is not None
        ]
        forget_logit, write_logit = logits[0], logits[1] if write is not None else None
        read, final_state, inverse = memory_forward(
            query, key, value, forget_logit, write_logit, state, document_start, options.eps
        )
        activity = gated_norm.launch_forward(read.flatten(-2), gate, None, width // num_heads, options.eps)
        written = (activity.view(rows.shape) @ rounded_out.t()).view(h.shape)
        if options.recorded:
            kept = (rows, projected, forget_logit, write_logit, state, document_start, inverse, read, activity)
            ctx.save_for_backward(*kept, rounded_in, rounded_out)
            ctx.options = options
            ctx.weights = [weight for weight in (in_projection, forget, write) if weight is not None]
            ctx.biases = [bias for bias in (forget_bias, write_bias) if bias is not None]
            ctx.out_projection = out_projection
        ctx.set_materialize_grads(False)
        return written, final_state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_written, grad_final_state = grads
        (
            rows, projected, forget_logit, write_logit, state, document_start, inverse, read, activity, rounded_in,
            rounded_out,
        ) = ctx.saved_tensors  # fmt: skip
        num_lanes, num_tokens, num_heads, head_width = read.shape
        width = num_heads * head_width
        if grad_written is None:
            grad_written = torch.zeros_like(activity)
        grad_rows = grad_written.reshape(rows.shape)
        grad_activity = grad_rows @ rounded_out
        (grad_out_projection,) = product_gradients([ctx.out_projection], grad_rows.t(), activity.view(rows.shape))

        wide = torch.empty(rows.shape[0], rounded_in.shape[0], dtype=rows.dtype, device=rows.device)
        query, key, value, gate = _parts(projected.view(num_lanes, num_tokens, -1), num_heads)
        grad_read, _ = gated_norm.launch_backward(
            read.flatten(-2), gate, None, grad_activity, wide[:, 3 * width : 4 * width], head_width, ctx.options.eps
        )
        grad_query, grad_key, grad_value, _ = _parts(wide.view(num_lanes, num_tokens, -1)[..., : 4 * width], num_heads)
        with idle_gpu():
            grad_forget, grad_write, grad_state = memory_backward_into(
                query,
                key,
                value,
                forget_logit,
                write_logit,
                state,
                document_start,
                inverse,
                grad_read.view(read.shape),
                grad_final_state,
                ctx.options.eps,
                out=(grad_query, grad_key, grad_value),
            )
        logit_grads = [grad.view(-1, num_heads) for grad in (grad_forget, grad_write)[: len(ctx.biases)]]
        write_columns(wide[:, 4 * width :], *logit_grads)

        grad_in_projection, *grad_gates = product_gradients(ctx.weights, wide.t(), rows)
        gates: list[Tensor | None] = []
        for grad_gate, bias, grad in zip(grad_gates, ctx.biases, logit_grads):
            gates += [grad_gate, sum_gradient(bias, grad)]
        return (
            (wide @ rounded_in).view(num_lanes, num_tokens, width),
            grad_in_projection,
            *(gates if write_logit is not None else [*gates, None, None]),
            grad_out_projection,
            grad_state,
            *(None,) * 4,
        )


def _parts(projected: Tensor, num_heads: int) -> list[Tensor]:
    """`[B, T, 4D]` as queries, keys and values `[B, T, H, N]` and gates `[B, T, D]`, all of them views."""
    *heads, gate = projected.chunk(4, dim=-1)
    return [*(z.unflatten(-1, (num_heads, -1)) for z in heads), gate]


def memory_circuit_fused(
    h: Tensor,
    in_projection: Tensor,
    forget: Tensor,
    forget_bias: Tensor,
    write: Tensor | None,
    write_bias: Tensor | None,
    out_projection: Tensor,
    state: Tensor,
    document_start: Tensor | None = None,
    *,
    rule: str,
    eps: float,
    rounded: tuple[RoundedWeights, RoundedWeights],
) -> tuple[Tensor, Tensor]:
    """`memory_circuit_reference` with products in h's type and weight gradients in the weights' own.

    Raises:
        ValueError: a device, type, width or rule that the kernels do not take.
    """
    check_launchable("memory_circuit", h, in_projection, forget, state, document_start)
    if rule not in RULES:
        raise ValueError(f"memory rule is {rule!r}; choose one of {', '.join(RULES)}")
    if (write is not None) != (rule == "delta"):
        raise ValueError(f"write weights go with the delta rule alone, and the rule is {rule!r}")
    head_width = h.shape[-1] // forget.shape[0]
    if head_width not in WIDTHS:
        raise ValueError(f"memory: head width is {head_width}; fused kernels take {', '.join(map(str, WIDTHS))}")
    weights = (in_projection, forget, forget_bias, write, write_bias, out_projection)
    differentiable = (h, *weights, state)
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    stacked = [weight for weight in (in_projection, forget, write) if weight is not None]
    rounded_in = rounded[0].get(stacked, h.dtype, rows_multiple=_ROWS_MULTIPLE)
    rounded_out = rounded[1].get([out_projection], h.dtype)
    return _MemoryCircuit.apply(h, *weights, state, document_start, rounded_in, rounded_out, _Options(eps, recorded))
