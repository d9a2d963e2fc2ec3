"""The norm of all gradients in two launches, and the verdict on a step in one."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.launch  # noqa: F401  before triton: it chooses the interpreter
from kernels.addresses import AddressTable, check_addressable
from kernels.launch import INTERPRETED, check_launchable
from kernels.verdict.reference import CLIP_EPS, LEAST_FACTOR, History

_BLOCK = 2048  # numbers a program reads at a time
_PART = 16 * _BLOCK  # and in all
_SUMS_AT_A_TIME = 2048
_COLUMNS = tl.constexpr(3)  # of the table: address, number of elements, and whether they are of half precision


@triton.jit
def _sum_of_squares(p_grad, first, last, BLOCK: tl.constexpr):
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(first, last, BLOCK, num_stages=2):
        offsets = start + tl.arange(0, BLOCK)
        b_grad = tl.load(p_grad + offsets, mask=offsets < last, other=0.0).to(tl.float32)
        b_sum += b_grad * b_grad
    return tl.sum(b_sum, axis=0)


@triton.jit
def _part_of_squares(p_grad, first, last, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    # A mask that ends on a multiple of WIDTH lets so many numbers be read at once. A product says so, not
    # `tl.multiple_of`: that is believed of `last` in the other branch as well.
    if last % WIDTH == 0:
        total = _sum_of_squares(p_grad, first, last // WIDTH * WIDTH, BLOCK)
    else:
        total = _sum_of_squares(p_grad, first, last, BLOCK)
    return total


@triton.jit
def square_sums_kernel(
    table_ptr,  # [P, 3] int64
    block_ptr,  # [programs, 2] int32: which tensor, and which part of it
    sum_ptr,  # [programs] float32
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    HALF: tl.constexpr,
):
    i_program = tl.program_id(0)
    row = table_ptr + tl.load(block_ptr + 2 * i_program) * _COLUMNS
    grad = tl.load(row)
    first = tl.load(block_ptr + 2 * i_program + 1).to(tl.int64) * PART
    last = tl.minimum(first + PART, tl.load(row + 1))
    if tl.load(row + 2) != 0:
        p_grad = tl.multiple_of(grad.to(tl.pointer_type(HALF)), 16)
        total = _part_of_squares(p_grad, first, last, 8, BLOCK)
    else:
        p_full_grad = tl.multiple_of(grad.to(tl.pointer_type(tl.float32)), 16)
        total = _part_of_squares(p_full_grad, first, last, 4, BLOCK)
    tl.store(sum_ptr + i_program, total)


@triton.jit
def root_kernel(sum_ptr, norm_ptr, num_sums, BLOCK: tl.constexpr):
    b_sum = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, num_sums, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        b_sum += tl.load(sum_ptr + offsets, mask=offsets < num_sums, other=0.0).to(tl.float64)
    tl.store(norm_ptr, tl.sqrt(tl.sum(b_sum, axis=0)).to(tl.float32))


@triton.jit
def _limit(b_values, count, SIGMA: tl.constexpr, LEAST_FACTOR: tl.constexpr, NUM: tl.constexpr):
    mean = tl.sum(b_values, axis=0) / NUM
    b_difference = b_values - mean
    deviation = tl.sqrt(tl.sum(b_difference * b_difference, axis=0) / (NUM - 1))
    limit = tl.maximum(mean + SIGMA * deviation, LEAST_FACTOR * mean)
    return tl.where(count >= NUM, limit, float("inf"))


@triton.jit
def verdict_kernel(
    loss_ptr,  # 0-d
    norm_ptr,  # 0-d
    value_ptr,  # [2, NUM] float64
    count_ptr,  # 0-d int64
    streak_ptr,  # 0-d int64
    skipped_ptr,  # 0-d float32
    factor_ptr,  # 0-d float32
    SIGMA: tl.constexpr,  # negative for no limits
    MAX_NORM: tl.constexpr,
    EPS: tl.constexpr,
    LEAST_FACTOR: tl.constexpr,
    NUM: tl.constexpr,
):
    loss, norm = tl.load(loss_ptr).to(tl.float64), tl.load(norm_ptr).to(tl.float64)
    finite = (tl.abs(loss) < float("inf")) & (tl.abs(norm) < float("inf"))
    skipped = finite == 0
    if SIGMA >= 0.0:
        offsets = tl.arange(0, NUM)
        inner = offsets < NUM - 1
        count = tl.load(count_ptr)
        loss_limit = _limit(tl.load(value_ptr + offsets), count, SIGMA, LEAST_FACTOR, NUM)
        norm_limit = _limit(tl.load(value_ptr + NUM + offsets), count, SIGMA, LEAST_FACTOR, NUM)
        skipped = skipped | (loss > loss_limit) | (norm > norm_limit)
        b_later_loss = tl.load(value_ptr + offsets + 1, mask=inner, other=0.0)
        b_later_norm = tl.load(value_ptr + NUM + offsets + 1, mask=inner, other=0.0)
        # No thread may write before all have read.
        tl.debug_barrier()
        if finite:
            tl.store(value_ptr + offsets, tl.where(inner, b_later_loss, tl.minimum(loss, loss_limit)))
            tl.store(value_ptr + NUM + offsets, tl.where(inner, b_later_norm, tl.minimum(norm, norm_limit)))
            tl.store(count_ptr, count + 1)
    streak = tl.load(streak_ptr)
    tl.store(streak_ptr, tl.where(skipped, streak + 1, 0))
    tl.store(skipped_ptr, skipped.to(tl.float32))
    factor = MAX_NORM / (norm.to(tl.float32) + EPS)
    tl.store(factor_ptr, tl.where(factor > 1.0, 1.0, factor))


def make_norm_table(grads: Sequence[Tensor]) -> AddressTable:
    """The table of launches that read tensors of these sizes."""
    sizes = [grad.numel() for grad in grads]
    return AddressTable(sizes, grads[0].device, part=_PART, num_columns=_COLUMNS.value)


def gradient_norm_fused(table: AddressTable, grads: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, 0-d float32; the same bits every time.

    Arguments:
        table: made by `make_norm_table` for tensors of these sizes.
        grads: contiguous float32, or half precision all of one type, each beginning on 16 bytes.

    Raises:
        ValueError: a tensor is not contiguous and of these types on one device, or not aligned.
    """
    check_launchable("gradient_norm", *grads)
    check_addressable("gradient_norm", *grads, dtypes=(torch.float32, torch.bfloat16, torch.float16))
    halves = {grad.dtype for grad in grads if grad.dtype != torch.float32}
    assert len(halves) <= 1, "half-precision gradients of one type a launch"
    addresses = table.note([(grad.data_ptr(), grad.numel(), int(grad.dtype != torch.float32)) for grad in grads])
    num_programs = len(table.blocks)
    sums = torch.empty(num_programs, dtype=torch.float32, device=grads[0].device)
    norm = torch.empty((), dtype=torch.float32, device=grads[0].device)
    num_warps = 1 if INTERPRETED else 4
    square_sums_kernel[(num_programs,)](
        addresses,
        table.blocks,
        sums,
        BLOCK=_BLOCK,
        PART=_PART,
        HALF=tl.float16 if torch.float16 in halves else tl.bfloat16,
        num_warps=num_warps,
    )
    block = min(_SUMS_AT_A_TIME, triton.next_power_of_2(num_programs))
    root_kernel[(1,)](sums, norm, num_programs, BLOCK=block, num_warps=min(max(block // 256, 1), 8))
    return norm


def verdict_fused(
    loss: Tensor, grad_norm: Tensor, history: History, *, sigma: float | None, max_norm: float
) -> tuple[Tensor, Tensor]:
    """`verdict_reference` in one launch; the number of steps remembered is a power of two."""
    skipped, factor = (torch.empty((), dtype=torch.float32, device=loss.device) for _ in range(2))
    verdict_kernel[(1,)](
        loss.detach(),
        grad_norm.detach(),
        *history,
        skipped,
        factor,
        SIGMA=-1.0 if sigma is None else float(sigma),
        MAX_NORM=float(max_norm),
        EPS=CLIP_EPS,
        LEAST_FACTOR=LEAST_FACTOR,
        NUM=history.values.shape[1],
        num_warps=1,
    )
    return skipped, factor
