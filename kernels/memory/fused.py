"""Fast-weight memory in Triton: one forward walk over chunks, and a backward pass that recomputes the states.

Storage is float32 or bfloat16 and the state float32; products of bfloat16 storage run on the tensor cores. Nothing is
kept for the backward pass but the arguments and, for the delta rule, one L x L matrix a chunk and head.
"""

import kernels.launch  # noqa: F401, I001  before triton
import torch
import triton
from torch import Tensor

from kernels.alongside import alongside
from kernels.launch import check_launchable
from kernels.memory.call import Call, has_large_shared, row_readable
from kernels.memory.launch_table import LaunchTable, launch_table
from kernels.memory.reference import RULES

WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16)


def memory_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forget_logit: Tensor,
    write_logit: Tensor | None,
    state: Tensor,
    document_start: Tensor | None = None,
    *,
    rule: str = "hebbian",
    chunk_size: int = 64,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Write keys and values into fast weights and read them with queries; formulas and shapes of `memory_reference`.

    Arguments:
        query, key, value: `[B, T, H, N]` of one type, float32 or bfloat16, N 16, 32, 64 or 128; views whose last
            dimension is contiguous are read in place.
        forget_logit, write_logit, state, document_start, rule, eps: as in `memory_reference`.
        chunk_size: the reference's; here the chunk's length is set by type, width and GPU, and means as little.

    Returns:
        o `[B, T, H, N]` in the values' type, and the state after the last token in float32.
    """
    if rule not in RULES:
        raise ValueError(f"memory rule is {rule!r}; choose one of {', '.join(RULES)}")
    if (write_logit is not None) != (rule == "delta"):
        raise ValueError(f"write_logit goes with the delta rule alone, and the rule is {rule!r}")
    check_launchable("memory", query, key, value, forget_logit, write_logit, state, document_start)
    if value.dtype not in DTYPES or query.dtype != value.dtype or key.dtype != value.dtype:
        raise ValueError(
            f"memory: query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; "
            "give all three as float32 or all three as bfloat16"
        )
    if value.shape[-1] not in WIDTHS:
        raise ValueError(f"memory: head width is {value.shape[-1]}; fused kernels are written for 16, 32, 64 and 128")
    if value.numel() == 0:
        return value, state.to(torch.float32)
    output, final_state, _ = memory_forward(query, key, value, forget_logit, write_logit, state, document_start, eps)
    return output, final_state


@torch.library.custom_op("neurogen::memory_forward", mutates_args=())
def memory_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forget_logit: Tensor,
    write_logit: Tensor | None,
    state: Tensor,
    document_start: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state, and the delta rule's inverses `[B * H, num_chunks, L, L]` (empty for the Hebbian rule)."""
    table = _table(value, write_logit)
    call = Call(query, key, value, forget_logit, write_logit, document_start, eps, table)
    inverse = call.inverse()
    output = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    final_state = torch.empty(state.shape, dtype=torch.float32, device=value.device)
    call.forward(inverse, state.float().contiguous(), output=output, final_state=final_state)
    return output, final_state, inverse


@memory_forward.register_fake
def _(query, key, value, forget_logit, write_logit, state, document_start, eps):
    num_lanes, num_tokens, num_heads, _ = value.shape
    inverse = value.new_empty(0)
    if write_logit is not None:
        length = _table(value, write_logit).length
        inverse = value.new_empty(num_lanes * num_heads, -(-num_tokens // length), length, length)
    output = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return output, torch.empty(state.shape, dtype=torch.float32, device=value.device), inverse


@torch.library.custom_op("neurogen::memory_backward", mutates_args=())
def memory_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forget_logit: Tensor,
    write_logit: Tensor | None,
    state: Tensor,
    document_start: Tensor | None,
    inverse: Tensor,
    output_grad: Tensor,
    final_state_grad: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, forget_logit, write_logit (empty for the Hebbian rule) and state."""
    query_grad, key_grad, value_grad = (
        torch.empty(value.shape, dtype=value.dtype, device=value.device) for _ in range(3)
    )
    forget_grad, write_grad, state_grad = memory_backward_into(
        query,
        key,
        value,
        forget_logit,
        write_logit,
        state,
        document_start,
        inverse,
        output_grad,
        final_state_grad,
        eps,
        out=(query_grad, key_grad, value_grad),
    )
    return query_grad, key_grad, value_grad, forget_grad, write_grad, state_grad


def memory_backward_into(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forget_logit: Tensor,
    write_logit: Tensor | None,
    state: Tensor,
    document_start: Tensor | None,
    inverse: Tensor,
    output_grad: Tensor,
    final_state_grad: Tensor | None,
    eps: float,
    *,
    out: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass, with the gradients of query, key and value written where the caller wants them.

    Arguments:
        all but out: those of `memory_backward`.
        out: three `[B, T, H, N]` tensors of the values' type and of equal strides with a contiguous last dimension,
            such as parts of the gradient of one projection `[B, T, 3 H N]` or wider. Every element is written.

    Returns:
        Gradients of forget_logit, write_logit (empty for the Hebbian rule) and state.
    """
    if len({(x.shape, x.dtype, x.stride()) for x in out} | {(value.shape, value.dtype, out[0].stride())}) > 1:
        raise ValueError(
            f"memory_backward_into: out is {[(tuple(x.shape), x.dtype, x.stride()) for x in out]}; "
            f"give three tensors of shape {tuple(value.shape)}, {value.dtype} and equal strides"
        )
    if row_readable(out[0]) is not out[0]:
        raise ValueError(f"memory_backward_into: out has strides {out[0].stride()}; the last must be 1")
    table = _table(value, write_logit)
    call = Call(query, key, value, forget_logit, write_logit, document_start, eps, table)
    num_chunks = triton.cdiv(value.shape[1], table.length)
    states = value.new_empty(state.shape[0] * state.shape[1], num_chunks, *state.shape[2:])
    state_grads = torch.empty_like(states)
    writes = torch.empty(value.shape if call.delta else 0, dtype=value.dtype, device=value.device)
    surprise_grad = torch.empty_like(writes)
    initial = state.float().contiguous()
    with alongside(value.device, num_programs=call.num_walks) as wait_for_states:
        call.forward(inverse, initial, states=states, writes=writes)
    state_grad = call.state_gradient(inverse, output_grad, final_state_grad, state_grads, surprise_grad)
    wait_for_states()
    forget_grad, write_grad = call.gradient(states, state_grads, writes, surprise_grad, output_grad, out)
    return forget_grad, write_grad, state_grad.to(state.dtype)


@memory_backward.register_fake
def _(
    query,
    key,
    value,
    forget_logit,
    write_logit,
    state,
    document_start,
    inverse,
    output_grad,
    final_state_grad,
    eps,
):
    def like(x):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    write_grad = value.new_empty(0) if write_logit is None else like(write_logit)
    return like(query), like(key), like(value), like(forget_logit), write_grad, like(state)


def _save_for_backward(ctx, inputs, output):
    *tensors, eps = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.eps = eps
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, output_grad, final_state_grad, _):
    *inputs, inverse = ctx.saved_tensors
    value, write_logit = inputs[2], inputs[4]
    if output_grad is None:
        output_grad = torch.zeros_like(value)
    *grads, write_grad, state_grad = memory_backward(*inputs, inverse, output_grad, final_state_grad, ctx.eps)
    return *grads, None if write_logit is None else write_grad, state_grad, None, None


memory_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


def _table(value: Tensor, write_logit: Tensor | None) -> LaunchTable:
    large_shared = has_large_shared(value)
    width = int(value.shape[-1])  # a graph with symbolic shapes is specialised to the head width
    return launch_table(value.dtype, width, delta=write_logit is not None, large_shared=large_shared)
