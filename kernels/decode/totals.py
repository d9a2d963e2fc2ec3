"""What the decoder counts and sums over rows, in a launch of one program each: the numbers of a row are few."""

import kernels.launch  # noqa: F401, I001  before triton: it chooses the interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS_AT_A_TIME = 8192


@triton.jit
def count_targets_kernel(
    target_ptr,  # [N] int64
    num_targets_ptr,  # [] int64
    zeroed_ptr,  # [num_zeroed] int32
    num_rows,
    num_zeroed,
    ignore_index,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    b_count = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, num_rows, BLOCK):
        b_target = tl.load(target_ptr + first + offsets, mask=first + offsets < num_rows, other=ignore_index)
        b_count += (b_target != ignore_index).to(tl.int64)
    tl.store(num_targets_ptr, tl.sum(b_count, axis=0))
    for first in range(0, num_zeroed, BLOCK):
        tl.store(zeroed_ptr + first + offsets, tl.zeros((BLOCK,), tl.int32), mask=first + offsets < num_zeroed)


@triton.jit
def sum_rows_kernel(
    loss_rows_ptr,  # [N] float32
    correct_rows_ptr,  # [N] int32
    num_targets_ptr,  # [] int64
    loss_ptr,  # [] float32
    num_correct_ptr,  # [] int64
    num_rows,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    b_loss = tl.zeros((BLOCK,), tl.float32)
    b_correct = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, num_rows, BLOCK):
        mask = first + offsets < num_rows
        b_loss += tl.load(loss_rows_ptr + first + offsets, mask=mask, other=0.0)
        b_correct += tl.load(correct_rows_ptr + first + offsets, mask=mask, other=0).to(tl.int64)
    num_targets = tl.maximum(tl.load(num_targets_ptr), 1).to(tl.float32)
    tl.store(loss_ptr, tl.sum(b_loss, axis=0) / num_targets)
    tl.store(num_correct_ptr, tl.sum(b_correct, axis=0))


def _block(num_rows: int) -> tuple[int, int]:
    """Rows at a time, and warps to work on them."""
    block = min(_ROWS_AT_A_TIME, triton.next_power_of_2(max(num_rows, 1)))
    return block, min(max(block // 512, 1), 16)


def count_targets(target_ids: Tensor, ignore_index: int, *, zeroed: Tensor) -> Tensor:
    """How many of `[N]` contiguous targets are not `ignore_index`, 0-d int64; `zeroed`, int32, is set to 0 with it."""
    num_targets = torch.empty((), dtype=torch.int64, device=target_ids.device)
    block, num_warps = _block(target_ids.numel())
    count_targets_kernel[(1,)](
        target_ids,
        num_targets,
        zeroed,
        target_ids.numel(),
        zeroed.numel(),
        ignore_index,
        BLOCK=block,
        num_warps=num_warps,
    )
    return num_targets


def sum_rows(loss_rows: Tensor, correct_rows: Tensor, num_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of losses over the number of targets, or over 1 if there is none, and the number of hits, both 0-d."""
    loss = torch.empty((), dtype=torch.float32, device=loss_rows.device)
    num_correct = torch.empty((), dtype=torch.int64, device=loss_rows.device)
    block, num_warps = _block(loss_rows.numel())
    sum_rows_kernel[(1,)](
        loss_rows, correct_rows, num_targets, loss, num_correct, loss_rows.numel(), BLOCK=block, num_warps=num_warps
    )
    return loss, num_correct
