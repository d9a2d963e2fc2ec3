"""Backward launches of the relay; `kernels.relay.fused` says how they go about it."""

import kernels.launch  # noqa: F401, I001  before triton: it chooses the interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear import idle_gpu
from kernels.relay.history import sort_history

_MOST_SLOTS = 32  # of a program, one after the other
_NUM_PROGRAMS = 256  # at least, where there are slots enough: a slot takes a program longer than its bytes need
_PARTIALS_PER_LOAD = 8


@triton.jit
def _reach(id_ptr, slot_ptr, start_ptr, i, num_sorted, num_tokens, J: tl.constexpr, HAS_START: tl.constexpr):
    """Of the i-th sorted slot: the token it stands for, counted over all lanes; from which j on the j-th token after it
    is one of its sequence and of its document, and from which on no more. None is past the end, or for a slot of no
    token."""
    inside = i < num_sorted
    slot = tl.load(slot_ptr + i, mask=inside, other=0)
    history_length = num_tokens + (J - 1)
    t = slot % history_length - (J - 1)
    token = slot // history_length * num_tokens + t
    last = tl.minimum(num_tokens - t, J)
    if HAS_START:
        for back in tl.static_range(1, J):
            ahead = J - back
            in_sequence = inside & (t + ahead >= 0) & (t + ahead < num_tokens)
            start = tl.load(start_ptr + token + ahead, mask=in_sequence, other=0)
            last = tl.where(start != 0, ahead, last)
    some = inside & (tl.load(id_ptr + i, mask=inside, other=-1) >= 0)
    return token, tl.maximum(-t, 0), tl.where(some, last, 0)


@triton.jit
def _later_gradients(grad_x_ptr, token, first, last, o_j, o_d, D: tl.constexpr):
    """`[BLOCK_J, BLOCK_D]`: gradient of x at the j-th token after this one, zero out of reach."""
    p_grad = grad_x_ptr + (token + o_j)[:, None] * D + o_d[None, :]
    mask = ((o_j >= first) & (o_j < last))[:, None] & (o_d < D)[None, :]
    return tl.load(p_grad, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normed_row(embedding_ptr, row, eps, o_d, D: tl.constexpr):
    """Row of the table divided by its root mean square, and one over that."""
    b_row = tl.load(embedding_ptr + row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(b_row * b_row, axis=0) / D + eps)
    return b_row * inverse_rms, inverse_rms


@triton.jit
def _store_row_gradient(grad_embedding_ptr, row, b_normed, inverse_rms, b_grad_normed, o_d, D: tl.constexpr):
    b_grad = inverse_rms * (b_grad_normed - b_normed * (tl.sum(b_grad_normed * b_normed, axis=0) / D))
    p_grad = grad_embedding_ptr + row * D + o_d
    tl.store(p_grad, b_grad.to(grad_embedding_ptr.dtype.element_ty), mask=o_d < D)


@triton.jit
def relay_sum_runs_kernel(
    grad_x_ptr,  # [B, T, D]
    id_ptr,  # [S] int32, sorted
    slot_ptr,  # [S] int64, which history slot each sorted id came from
    embedding_ptr,  # [V, D]
    taps_ptr,  # [J, D]
    start_ptr,  # [B, T] bool, unless not HAS_START
    grad_embedding_ptr,  # [V, D], zero
    partial_ptr,  # [S / SLOTS, 2, D] float32: of a run that began earlier, and of one that goes on
    grad_taps_ptr,  # [S / SLOTS, J, D] float32
    num_sorted,
    num_tokens,
    vocab_size,
    eps,
    J: tl.constexpr,
    D: tl.constexpr,
    HAS_START: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    o_j, o_d = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
    in_taps = (o_j < J)[:, None] & (o_d < D)[None, :]
    b_grad_taps = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    b_run = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)

    first = i_program * SLOTS
    last = first + SLOTS - 1
    began_earlier = tl.load(id_ptr + first - 1, mask=first > 0, other=-1) == tl.load(id_ptr + first)
    # The slots of no token are sorted first; a program that has no others has nothing to sum.
    end = tl.where(tl.load(id_ptr + last) >= 0, first + SLOTS, first)
    # What a slot adds is asked for while the slot before is worked on, and where it lies one slot earlier still.
    token, j_first, j_last = _reach(id_ptr, slot_ptr, start_ptr, first, end, num_tokens, J, HAS_START)
    b_next = _later_gradients(grad_x_ptr, token, j_first, j_last, o_j, o_d, D)
    token, j_first, j_last = _reach(id_ptr, slot_ptr, start_ptr, first + 1, end, num_tokens, J, HAS_START)
    for i in range(first, end):
        b_later = b_next
        b_next = _later_gradients(grad_x_ptr, token, j_first, j_last, o_j, o_d, D)
        token, j_first, j_last = _reach(id_ptr, slot_ptr, start_ptr, i + 2, end, num_tokens, J, HAS_START)
        token_id = tl.load(id_ptr + i)
        next_id = tl.load(id_ptr + i + 1, mask=i + 1 < num_sorted, other=-1)
        if (token_id >= 0) & (token_id < vocab_size):
            b_run += b_later
            ends = next_id != token_id
            if ends | (i == last):
                row = token_id.to(tl.int64)
                b_normed, inverse_rms = _normed_row(embedding_ptr, row, eps, o_d, D)
                b_grad_taps += b_normed[None, :] * b_run
                b_tap = tl.load(taps_ptr + o_j[:, None] * D + o_d[None, :], mask=in_taps, other=0.0).to(tl.float32)
                b_grad_normed = tl.sum(b_tap * b_run, axis=0)
                if ends & (began_earlier == 0):
                    _store_row_gradient(grad_embedding_ptr, row, b_normed, inverse_rms, b_grad_normed, o_d, D)
                else:
                    side = tl.where(began_earlier, 0, 1)
                    tl.store(partial_ptr + (i_program * 2 + side) * D + o_d, b_grad_normed, mask=o_d < D)
                b_run = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
        if next_id != token_id:
            began_earlier = began_earlier & False
    p_grad_taps = grad_taps_ptr + (i_program * J + o_j)[:, None] * D + o_d[None, :]
    tl.store(p_grad_taps, b_grad_taps, mask=in_taps)


@triton.jit
def relay_join_runs_kernel(
    id_ptr,
    partial_ptr,
    embedding_ptr,
    grad_embedding_ptr,
    num_programs,
    vocab_size,
    eps,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program i finishes the run that begins among the slots of the kernel above's program i and goes on after them."""
    i_program = tl.program_id(0).to(tl.int64)
    o_d, o_p = tl.arange(0, BLOCK_D), tl.arange(0, PARTIALS)
    first = i_program * SLOTS
    token_id = tl.load(id_ptr + first + SLOTS - 1)
    goes_on = tl.load(id_ptr + first + SLOTS, mask=i_program + 1 < num_programs, other=-1) == token_id
    began_earlier = tl.load(id_ptr + first - 1, mask=first > 0, other=-1) == token_id
    if goes_on & (began_earlier == 0) & (token_id >= 0) & (token_id < vocab_size):
        b_sum = tl.load(partial_ptr + (i_program * 2 + 1) * D + o_d, mask=o_d < D, other=0.0)
        other = i_program + 1
        while goes_on:
            i_other = other + o_p
            b_id = tl.load(id_ptr + i_other * SLOTS, mask=i_other < num_programs, other=-1)
            p_partial = partial_ptr + (i_other * 2)[:, None] * D + o_d[None, :]
            b_partial = tl.load(p_partial, mask=(b_id == token_id)[:, None] & (o_d < D)[None, :], other=0.0)
            b_sum += tl.sum(b_partial, axis=0)
            other += PARTIALS
            goes_on = tl.load(id_ptr + other * SLOTS, mask=other < num_programs, other=-1) == token_id
        row = token_id.to(tl.int64)
        b_normed, inverse_rms = _normed_row(embedding_ptr, row, eps, o_d, D)
        _store_row_gradient(grad_embedding_ptr, row, b_normed, inverse_rms, b_sum, o_d, D)


def row_warps(block_d: int) -> int:
    """Warps for a program whose rows are `block_d` wide: about eight numbers a thread and row."""
    return min(max(block_d // 256, 1), 8)


def slots_of_a_program(num_slots: int) -> int:
    """A power of two."""
    return min(triton.next_power_of_2(triton.cdiv(num_slots, _NUM_PROGRAMS)), _MOST_SLOTS)


def relay_backward_launch(
    grad_x: Tensor,
    input_ids: Tensor,
    recent_ids: Tensor,
    embedding: Tensor,
    taps: Tensor,
    document_start: Tensor | None,
    eps: float,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of the embedding, in grad_dtype, and the taps; other arguments as for `relay_fused`."""
    num_taps, width = taps.shape
    lanes, num_tokens = input_ids.shape
    grad_embedding = torch.zeros_like(embedding, dtype=grad_dtype, memory_format=torch.contiguous_format)
    if lanes * num_tokens == 0:
        return grad_embedding, torch.zeros_like(taps, memory_format=torch.contiguous_format)
    grad_x, embedding, taps = grad_x.contiguous(), embedding.contiguous(), taps.contiguous()
    slots_per_program = slots_of_a_program(lanes * (num_tokens + num_taps - 1))
    with idle_gpu():
        sorted_ids, slots = sort_history(input_ids, recent_ids, multiple=slots_per_program)

    num_sorted = len(sorted_ids)
    num_programs = num_sorted // slots_per_program
    partials = torch.empty(num_programs, 2, width, dtype=torch.float32, device=grad_x.device)
    grad_taps = torch.empty(num_programs, num_taps, width, dtype=torch.float32, device=grad_x.device)
    block_d = triton.next_power_of_2(width)
    relay_sum_runs_kernel[(num_programs,)](
        grad_x,
        sorted_ids,
        slots,
        embedding,
        taps,
        None if document_start is None else document_start.contiguous(),
        grad_embedding,
        partials,
        grad_taps,
        num_sorted,
        num_tokens,
        embedding.shape[0],
        eps,
        J=num_taps,
        D=width,
        HAS_START=document_start is not None,
        SLOTS=slots_per_program,
        BLOCK_J=triton.next_power_of_2(num_taps),
        BLOCK_D=block_d,
        num_warps=row_warps(block_d),
    )
    relay_join_runs_kernel[(num_programs,)](
        sorted_ids,
        partials,
        embedding,
        grad_embedding,
        num_programs,
        embedding.shape[0],
        eps,
        D=width,
        SLOTS=slots_per_program,
        PARTIALS=_PARTIALS_PER_LOAD,
        BLOCK_D=block_d,
        num_warps=row_warps(block_d),
    )
    return grad_embedding, grad_taps.sum(0).to(taps.dtype)
