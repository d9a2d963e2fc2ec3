"""The ids of a sequence and of what came before it, and their order by id.

A lane's *history* is its J-1 carried ids, then its T ids; slot h of it stands for token h - (J-1). Lanes follow each
other: B (J-1+T) slots in all.
"""

import kernels.launch  # noqa: F401, I001  before triton: it chooses the interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

# An id's place among n others takes n comparisons: up to here they cost less than the launches of a radix sort.
_MOST_COMPARED = 8192
_PLACED_AT_A_TIME = 32
_COMPARED_AT_A_TIME = 256


@triton.jit
def load_ids(input_ptr, recent_ptr, lane, t, num_tokens, mask, J: tl.constexpr):
    """Ids of a lane's tokens t, which may lie up to J - 1 before the sequence; -1 where not `mask`."""
    b_recent = tl.load(recent_ptr + lane * (J - 1) + (J - 1) + t, mask=mask & (t < 0), other=-1)
    b_input = tl.load(input_ptr + lane * num_tokens + t, mask=mask & (t >= 0), other=-1)
    return tl.where(t < 0, b_recent, b_input)


@triton.jit
def _slot_ids(input_ptr, recent_ptr, slot, num_slots, num_tokens, J: tl.constexpr):
    history_length = num_tokens + (J - 1)
    lane, t = (slot // history_length).to(tl.int64), slot % history_length - (J - 1)
    return load_ids(input_ptr, recent_ptr, lane, t, num_tokens, slot < num_slots, J).to(tl.int32)


@triton.jit
def sort_history_kernel(
    input_ptr,  # [B, T] int64
    recent_ptr,  # [B, J-1] int64
    sorted_ptr,  # [num_sorted] int32
    slot_ptr,  # [num_sorted] int64
    num_slots,
    num_sorted,
    num_tokens,
    J: tl.constexpr,
    PLACED: tl.constexpr,
    COMPARED: tl.constexpr,
):
    o_i = tl.program_id(0) * PLACED + tl.arange(0, PLACED)
    b_id = _slot_ids(input_ptr, recent_ptr, o_i, num_slots, num_tokens, J)
    b_place = tl.zeros((PLACED,), tl.int32)
    for first in range(0, num_sorted, COMPARED):
        o_k = first + tl.arange(0, COMPARED)
        b_other = _slot_ids(input_ptr, recent_ptr, o_k, num_slots, num_tokens, J)
        before = b_other[None, :] < b_id[:, None]
        before = before | ((b_other[None, :] == b_id[:, None]) & (o_k[None, :] < o_i[:, None]))
        b_place += tl.sum((before & (o_k < num_sorted)[None, :]).to(tl.int32), axis=1)
    tl.store(sorted_ptr + b_place, b_id, mask=o_i < num_sorted)
    tl.store(slot_ptr + b_place, o_i.to(tl.int64), mask=o_i < num_sorted)


def sort_history(input_ids: Tensor, recent_ids: Tensor, *, multiple: int) -> tuple[Tensor, Tensor]:
    """All slots by id, those of one id by slot: the ids, int32, and the slots, int64.

    Both are filled up to a multiple of `multiple`, which slots of id -1 at the beginning stand for.
    """
    lanes, num_tokens = input_ids.shape
    num_taps = recent_ids.shape[1] + 1
    num_slots = lanes * (num_tokens + num_taps - 1)
    num_sorted = triton.cdiv(num_slots, multiple) * multiple
    if num_sorted > _MOST_COMPARED:
        ids = torch.cat([recent_ids, input_ids], dim=1).reshape(-1).to(torch.int32)
        ordered, slots = torch.nn.functional.pad(ids, (0, num_sorted - num_slots), value=-1).sort(stable=True)
        return ordered, slots
    ordered = torch.empty(num_sorted, dtype=torch.int32, device=input_ids.device)
    slots = torch.empty(num_sorted, dtype=torch.int64, device=input_ids.device)
    sort_history_kernel[(triton.cdiv(num_sorted, _PLACED_AT_A_TIME),)](
        input_ids.contiguous(),
        recent_ids.contiguous(),
        ordered,
        slots,
        num_slots,
        num_sorted,
        num_tokens,
        J=num_taps,
        PLACED=_PLACED_AT_A_TIME,
        COMPARED=_COMPARED_AT_A_TIME,
        num_warps=4,
    )
    return ordered, slots
