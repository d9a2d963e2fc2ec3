"""Relay in one launch forward; backward sums each row's gradient over its occurrences in a fixed order.

Shape letters: B lanes, T tokens, D width, V vocabulary, J taps; `kernels.relay.history` says what a history slot is.

Backward. With G[id, j] = sum over the slots of an id of the gradient j tokens later (zero across a document's start),
the taps' gradient is sum_id n_id * G[id, j] and the row's is the RMS backward of sum_j taps[j] * G[id, j], since n_id
is one vector for all occurrences. So slots are sorted by id and each run of equal ids is summed. A program takes a
fixed number of sorted slots; runs that cross programs leave partial sums, which a second launch adds up.
"""

import kernels.launch  # noqa: F401, I001  before triton: it chooses the interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import check_launchable
from kernels.linear import handed_over, stored_dtype
from kernels.relay.backward import relay_backward_launch, row_warps
from kernels.relay.history import load_ids


@triton.jit
def relay_forward_kernel(
    input_ptr,  # [B, T] int64
    recent_ptr,  # [B, J-1] int64
    embedding_ptr,  # [V, D]
    taps_ptr,  # [J, D]
    start_ptr,  # [B, T] bool, unless not HAS_START
    x_ptr,  # [B, T, D]
    carried_ptr,  # [B, J-1] int64
    num_tokens,
    vocab_size,
    eps,
    J: tl.constexpr,
    D: tl.constexpr,
    HAS_START: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    lane, t = i_token // num_tokens, i_token % num_tokens
    o_j, o_d = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
    in_taps, in_row = o_j < J, o_d < D

    reachable = in_taps
    if HAS_START:
        for back in tl.static_range(J - 1):
            start = tl.load(start_ptr + i_token - back, mask=t >= back, other=0)
            reachable = reachable & ((o_j <= back) | (start == 0))

    b_id = load_ids(input_ptr, recent_ptr, lane, t - o_j, num_tokens, in_taps, J)
    b_id = tl.where(reachable, b_id, -1)
    in_table = (b_id >= 0) & (b_id < vocab_size)
    in_tile = in_table[:, None] & in_row[None, :]
    b_row = tl.load(embedding_ptr + b_id[:, None] * D + o_d[None, :], mask=in_tile, other=0.0).to(tl.float32)
    b_inverse_rms = tl.rsqrt(tl.sum(b_row * b_row, axis=1) / D + eps)
    b_tap = tl.load(taps_ptr + o_j[:, None] * D + o_d[None, :], mask=in_taps[:, None] & in_row[None, :], other=0.0)
    b_x = tl.sum(b_tap.to(tl.float32) * b_row * b_inverse_rms[:, None], axis=0)

    # An id outside the table cannot be looked up; NaN shows it, where a clamped id would hide it.
    if tl.max(((b_id < -1) | (b_id >= vocab_size)).to(tl.int32), axis=0) > 0:
        b_x = b_x * float("nan")
    tl.store(x_ptr + i_token * D + o_d, b_x.to(x_ptr.dtype.element_ty), mask=in_row)
    if t == num_tokens - 1:
        tl.store(carried_ptr + lane * (J - 1) + (J - 2) - o_j, b_id, mask=o_j < J - 1)


@torch.library.custom_op("neurogen::relay_forward", mutates_args=())
def relay_forward(
    input_ids: Tensor,
    recent_ids: Tensor,
    embedding: Tensor,
    taps: Tensor,
    document_start: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Ids `[B, T]`, after `[B, J-1]`, to x `[B, T, D]` and the ids to carry `[B, J-1]`; see `relay_fused`."""
    num_taps, width = taps.shape
    lanes, num_tokens = input_ids.shape
    x = torch.empty(lanes, num_tokens, width, dtype=out_dtype, device=embedding.device)
    carried = torch.empty(lanes, num_taps - 1, dtype=torch.int64, device=embedding.device)
    if x.shape[0] * x.shape[1] == 0:
        return x, carried.copy_(recent_ids)
    block_d = triton.next_power_of_2(width)
    relay_forward_kernel[(lanes * num_tokens,)](
        input_ids.contiguous(),
        recent_ids.contiguous(),
        embedding.contiguous(),
        taps.contiguous(),
        None if document_start is None else document_start.contiguous(),
        x,
        carried,
        num_tokens,
        embedding.shape[0],
        eps,
        J=num_taps,
        D=width,
        HAS_START=document_start is not None,
        BLOCK_J=triton.next_power_of_2(num_taps),
        BLOCK_D=block_d,
        num_warps=row_warps(block_d),
    )
    return x, carried


@relay_forward.register_fake
def _(input_ids, recent_ids, embedding, taps, document_start, eps, out_dtype):  # type: ignore[no-untyped-def]
    x = embedding.new_empty(*input_ids.shape, taps.shape[1], dtype=out_dtype)
    return x, torch.empty_like(recent_ids)


@torch.library.custom_op("neurogen::relay_backward", mutates_args=())
def relay_backward(
    grad_x: Tensor,
    input_ids: Tensor,
    recent_ids: Tensor,
    embedding: Tensor,
    taps: Tensor,
    document_start: Tensor | None,
    eps: float,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients `[V, D]` of the embedding, in grad_dtype, and `[J, D]` of the taps from that of x; the same bits every
    time."""
    return relay_backward_launch(grad_x, input_ids, recent_ids, embedding, taps, document_start, eps, grad_dtype)


@relay_backward.register_fake
def _(grad_x, input_ids, recent_ids, embedding, taps, document_start, eps, grad_dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(embedding, dtype=grad_dtype), torch.empty_like(taps)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.eps = eps
    ctx.embedding = inputs[2]  # the leaf: what was saved is another object


def _backward(ctx, grad_x, grad_carried):  # type: ignore[no-untyped-def]
    if grad_x is None:
        return (None,) * 7
    grad_dtype = stored_dtype(ctx.embedding, grad_x)
    grad_embedding, grad_taps = relay_backward(grad_x, *ctx.saved_tensors, ctx.eps, grad_dtype)
    return None, None, handed_over(ctx.embedding, grad_embedding), grad_taps, None, None, None


relay_forward.register_autograd(_backward, setup_context=_setup_context)


def relay_fused(
    input_ids: Tensor,
    embedding: Tensor,
    taps: Tensor,
    recent_ids: Tensor,
    document_start: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`relay_reference` in one launch, its backward deterministic; arguments and results as there.

    An id outside `[0, V)` other than -1, which the reference rejects, makes the outputs it reaches NaN: a launch cannot
    raise without a synchronisation.

    Raises:
        ValueError: the tensors are not all on one device that fused kernels run on, or are float64.
    """
    check_launchable("relay", input_ids, embedding, taps, recent_ids, document_start)
    return relay_forward(input_ids, recent_ids, embedding, taps, document_start, eps, out_dtype or embedding.dtype)
