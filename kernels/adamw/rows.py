"""AdamW of a table whose rows are few of them read and given a gradient in a step: an embedding.

A row is updated when somebody needs it. What its steps were is kept on the device, the last K of them: the row makes up
for those it has missed one by one, as if it had taken each with the others, to the bit; but it is read and written once
for all of them. It must have done so before the step after next gives it a gradient, and before K steps have gone by:

    note        at the end of a step: its rate, its clipping factor, whether it is skipped, and its corrections
    catch_up    before the next step gathers rows: these, and those that the last step has a gradient of
    make_up     a K-th of the table in every step, in turn; all of it before somebody reads the whole

Steps are numbered here from one on, skipped ones too; every row has the number of the last it has taken.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.launch  # noqa: F401  before triton: it chooses the interpreter
from kernels.adamw.fused import Launch, log_beta, move, triton_dtype
from kernels.launch import INTERPRETED

# Of a record: learning rate, clipping factor, 1.0 if skipped, 1 - beta1^step, 1 - beta2^step.
_RECORD = tl.constexpr(5)


class RowSteps(NamedTuple):
    """Which steps there were, and which of them every row has taken.

    number: 0-d int32, of the last step noted.
    records: `[K, 5]` float32, step s at s % K.
    taken: `[V]` int32.
    """

    number: Tensor
    records: Tensor
    taken: Tensor

    @classmethod
    def new(cls, num_rows: int, num_kept: int, device: torch.device) -> "RowSteps":
        """Before the first step, for a table of V rows and K = num_kept steps at most between two turns of a row."""
        return cls(
            torch.zeros((), dtype=torch.int32, device=device),
            torch.zeros(num_kept, _RECORD.value, dtype=torch.float32, device=device),
            torch.zeros(num_rows, dtype=torch.int32, device=device),
        )


@triton.jit
def note_kernel(
    step_ptr,  # 0-d float32, the optimiser's count of steps that were not skipped
    number_ptr,  # 0-d int32
    record_ptr,  # [K, 5] float32
    lr_ptr,  # 0-d float32
    grad_scale_ptr,
    skip_ptr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    K: tl.constexpr,
):
    number = tl.load(number_ptr) + 1
    skip = tl.load(skip_ptr)
    step = tl.load(step_ptr) + (1.0 - skip)
    p_record = record_ptr + (number % K) * _RECORD
    tl.store(number_ptr, number)
    tl.store(step_ptr, step)
    tl.store(p_record, tl.load(lr_ptr))
    tl.store(p_record + 1, tl.load(grad_scale_ptr))
    tl.store(p_record + 2, skip)
    # As `adamw_corrections_kernel` makes them.
    tl.store(p_record + 3, (1.0 - tl.exp(step.to(tl.float64) * LOG_BETA1)).to(tl.float32))
    tl.store(p_record + 4, (1.0 - tl.exp(step.to(tl.float64) * LOG_BETA2)).to(tl.float32))


@triton.jit
def _take(
    number, b_param, b_grad, b_avg, b_avg_sq, record_ptr, beta1, beta2, eps, weight_decay, K: tl.constexpr,
    MOMENT: tl.constexpr,
):  # fmt: skip
    """One step, from moments as they are stored to moments as they will be."""
    p_record = record_ptr + (number % K) * _RECORD
    if tl.load(p_record + 2) == 0.0:
        b_param, b_avg, b_avg_sq = move(
            b_param, b_grad * tl.load(p_record + 1), b_avg, b_avg_sq, tl.load(p_record), tl.load(p_record + 3),
            tl.load(p_record + 4), beta1, beta2, eps, weight_decay,
        )  # fmt: skip
        b_avg = b_avg.to(MOMENT).to(tl.float32)
        b_avg_sq = b_avg_sq.to(MOMENT).to(tl.float32)
    return b_param, b_avg, b_avg_sq


@triton.jit
def _make_up_row(
    row, table_ptr, number_ptr, record_ptr, taken_ptr, beta1, beta2, eps, weight_decay, D: tl.constexpr,
    K: tl.constexpr, BLOCK_D: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
):  # fmt: skip
    """All steps that a row has missed; of its programs the first takes them. A row has no gradient of any but the last
    step, and none of that either if GRAD is None."""
    number = tl.load(number_ptr)
    taken = tl.atomic_xchg(taken_ptr + row, number)
    if taken < number:
        p_param = tl.multiple_of(tl.load(table_ptr).to(tl.pointer_type(tl.float32)), 16)
        p_avg = tl.multiple_of(tl.load(table_ptr + 2).to(tl.pointer_type(MOMENT)), 16)
        p_avg_sq = tl.multiple_of(tl.load(table_ptr + 3).to(tl.pointer_type(MOMENT)), 16)
        o_d = tl.arange(0, BLOCK_D)
        mask = o_d < D
        offsets = row * D + o_d
        b_param = tl.load(p_param + offsets, mask=mask, other=0.0)
        b_avg = tl.load(p_avg + offsets, mask=mask, other=0.0).to(tl.float32)
        b_avg_sq = tl.load(p_avg_sq + offsets, mask=mask, other=0.0).to(tl.float32)
        b_zero = tl.zeros((BLOCK_D,), tl.float32)
        b_grad = b_zero
        if GRAD is not None:
            p_grad = tl.multiple_of(tl.load(table_ptr + 1).to(tl.pointer_type(GRAD)), 16)
            b_grad = tl.load(p_grad + offsets, mask=mask, other=0.0).to(tl.float32)
        for missed in range(taken + 1, number):
            b_param, b_avg, b_avg_sq = _take(
                missed, b_param, b_zero, b_avg, b_avg_sq, record_ptr, beta1, beta2, eps, weight_decay, K, MOMENT
            )
        b_param, b_avg, b_avg_sq = _take(
            number, b_param, b_grad, b_avg, b_avg_sq, record_ptr, beta1, beta2, eps, weight_decay, K, MOMENT
        )
        tl.store(p_param + offsets, b_param, mask=mask)
        tl.store(p_avg + offsets, b_avg.to(MOMENT), mask=mask)
        tl.store(p_avg_sq + offsets, b_avg_sq.to(MOMENT), mask=mask)


@triton.jit
def catch_up_kernel(
    table_ptr,  # [1, 8] int64, see kernels.adamw.fused
    before_ptr,  # [N] int64: rows that the last step may have given a gradient
    now_ptr,  # [N] int64: rows that the next step reads
    number_ptr,
    record_ptr,
    taken_ptr,
    num_ids,
    num_rows,
    beta1,
    beta2,
    eps,
    weight_decay,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
):
    i = tl.program_id(0)
    b_before = tl.load(before_ptr + i, mask=i < num_ids, other=-1)
    b_now = tl.load(now_ptr + i - num_ids, mask=i >= num_ids, other=-1)
    row = tl.maximum(b_before, b_now)  # an id of no token is negative
    if (row >= 0) & (row < num_rows):
        _make_up_row(
            row, table_ptr, number_ptr, record_ptr, taken_ptr, beta1, beta2, eps, weight_decay, D, K, BLOCK_D, GRAD,
            MOMENT,
        )  # fmt: skip


@triton.jit
def make_up_kernel(
    table_ptr,  # [1, 8] int64
    number_ptr,
    record_ptr,
    taken_ptr,
    num_rows,
    beta1,
    beta2,
    eps,
    weight_decay,
    PARTS: tl.constexpr,  # of the table, of which the last step's number chooses one
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOMENT: tl.constexpr,
):
    part = tl.load(number_ptr) % PARTS
    row = part.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    if row < num_rows:
        _make_up_row(
            row, table_ptr, number_ptr, record_ptr, taken_ptr, beta1, beta2, eps, weight_decay, D, K, BLOCK_D, None,
            MOMENT,
        )  # fmt: skip


def note(steps: RowSteps, launch: Launch, step: Tensor) -> None:
    """The step that `launch` describes has been decided on, and `step`, the table's 0-d count, is one more unless it is
    skipped."""
    note_kernel[(1,)](
        step,
        steps.number,
        steps.records,
        launch.lr,
        launch.grad_scale,
        launch.skip,
        LOG_BETA1=log_beta(launch.options.beta1),
        LOG_BETA2=log_beta(launch.options.beta2),
        K=len(steps.records),
        num_warps=1,
    )


def catch_up(steps: RowSteps, launch: Launch, width: int, before: Tensor, now: Tensor) -> None:
    """Bring rows `before` and `now`, `[N]` int64 each, up to the last step noted; ids outside the table are ignored.

    Arguments:
        launch: describes the table alone.
        width: D, of a row.
        before: every row whose gradient at that step is not zero, unless it is up to it already.
    """
    assert before.shape == now.shape
    assert before.is_contiguous()
    assert now.is_contiguous()
    catch_up_kernel[(2 * len(now),)](
        launch.addresses,
        before,
        now,
        *steps,
        len(now),
        len(steps.taken),
        *launch.options,
        D=width,
        K=len(steps.records),
        BLOCK_D=triton.next_power_of_2(width),
        GRAD=triton_dtype(launch.grad_half if launch.reads_half else torch.float32),
        MOMENT=triton_dtype(launch.moment),
        num_warps=_warps(width),
    )


def make_up(steps: RowSteps, launch: Launch, width: int, *, whole: bool) -> None:
    """Bring the rows whose turn it is up to the last step noted, or all of them; reads no gradient, so rows that have
    one have caught up before."""
    num_rows, num_parts = len(steps.taken), 1 if whole else len(steps.records)
    make_up_kernel[(triton.cdiv(num_rows, num_parts),)](
        launch.addresses,
        *steps,
        num_rows,
        *launch.options,
        PARTS=num_parts,
        D=width,
        K=len(steps.records),
        BLOCK_D=triton.next_power_of_2(width),
        MOMENT=triton_dtype(launch.moment),
        num_warps=_warps(width),
    )


def _warps(width: int) -> int:
    return 1 if INTERPRETED else min(max(triton.next_power_of_2(width) // 256, 1), 8)
