"""AdamW over any number of parameters in one launch: each number is read and written once.

Besides what torch's fused AdamW does, the launch scales the gradient (by the clipping factor, which costs a pass over
all gradients otherwise) and writes the parameter a second time in half precision, for the products of the next step.

A step may also be launched in pieces, each over some of the parameters, beside a forward pass that waits for each of
them (`describe`, `count_steps`, `launch_blocks`).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.launch  # noqa: F401  before triton: it chooses the interpreter
from kernels.adamw.reference import AdamWOptions
from kernels.addresses import AddressTable, check_addressable
from kernels.launch import INTERPRETED, check_launchable

_BLOCK = 1024  # numbers a program works on at a time
_BLOCKS = 8  # a program works on one after the other, having read once where its tensors lie
_PROGRAM = _BLOCK * _BLOCKS
# Of the table: addresses of the parameter, its gradient, its two averages, its half-precision copy (0 for none) and its
# number of steps, the number of elements, and whether the gradient is of half precision.
_COLUMNS = tl.constexpr(8)
_SMALLEST_LOG = -1e30  # for a beta of 0


@triton.jit
def move(b_param, b_grad, b_avg, b_avg_sq, lr, correction1, correction2, beta1, beta2, eps, weight_decay):
    """The step itself, of the parameter, m and v. Which products are fused with a sum is written out: kernels that
    share this give the same bits, however each is compiled."""
    b_avg = tl.fma(b_avg, beta1, b_grad * (1.0 - beta1))
    b_avg_sq = tl.fma(b_avg_sq, beta2, b_grad * (1.0 - beta2) * b_grad)
    b_denominator = tl.sqrt(b_avg_sq / correction2) + eps
    b_step = (lr / correction1) * b_avg / b_denominator
    return tl.fma(b_param, 1.0 - lr * weight_decay, -b_step), b_avg, b_avg_sq


@triton.jit
def _update(
    p_param, p_grad, p_avg, p_avg_sq, rounded, first, last, lr, scale, correction1, correction2, beta1, beta2, eps,
    weight_decay, BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Elements first to last of one parameter."""
    for start in tl.range(first, last, BLOCK, num_stages=2):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < last
        b_grad = tl.load(p_grad + offsets, mask=mask, other=0.0).to(tl.float32) * scale
        b_param = tl.load(p_param + offsets, mask=mask, other=0.0)
        b_avg = tl.load(p_avg + offsets, mask=mask, other=0.0).to(tl.float32)
        b_avg_sq = tl.load(p_avg_sq + offsets, mask=mask, other=0.0).to(tl.float32)
        b_param, b_avg, b_avg_sq = move(
            b_param, b_grad, b_avg, b_avg_sq, lr, correction1, correction2, beta1, beta2, eps, weight_decay
        )
        tl.store(p_param + offsets, b_param, mask=mask)
        tl.store(p_avg + offsets, b_avg.to(p_avg.dtype.element_ty), mask=mask)
        tl.store(p_avg_sq + offsets, b_avg_sq.to(p_avg_sq.dtype.element_ty), mask=mask)
        if rounded != 0:
            p_rounded = tl.multiple_of(rounded.to(tl.pointer_type(HALF)), 16)
            tl.store(p_rounded + offsets, b_param.to(HALF), mask=mask)


@triton.jit
def _update_part(
    p_param, p_grad, p_avg, p_avg_sq, rounded, first, last, lr, scale, correction1, correction2, beta1, beta2, eps,
    weight_decay, BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # A mask that ends on a multiple of four lets four numbers be read at once. A product says so, not
    # `tl.multiple_of`: that is believed of `last` in the other branch as well.
    if last % 4 == 0:
        _update(
            p_param, p_grad, p_avg, p_avg_sq, rounded, first, last // 4 * 4, lr, scale, correction1, correction2,
            beta1, beta2, eps, weight_decay, BLOCK, HALF,
        )  # fmt: skip
    else:
        _update(
            p_param, p_grad, p_avg, p_avg_sq, rounded, first, last, lr, scale, correction1, correction2, beta1,
            beta2, eps, weight_decay, BLOCK, HALF,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_block"])
def adamw_kernel(
    table_ptr,  # [P, 8] int64
    block_ptr,  # [blocks, 2] int32: which parameter, and which part of it
    correction_ptr,  # [P, 2] float32: 1 - beta1^step, 1 - beta2^step
    lr_ptr,  # 0-d float32
    grad_scale_ptr,  # 0-d float32
    skip_ptr,  # 0-d float32
    first_block,  # of this launch
    beta1,
    beta2,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    HALF: tl.constexpr,
    GRAD_HALF: tl.constexpr,
    MOMENT: tl.constexpr,
):
    if tl.load(skip_ptr) == 0.0:
        lr = tl.load(lr_ptr)
        scale = tl.load(grad_scale_ptr)
        i = first_block + tl.program_id(0)
        i_param = tl.load(block_ptr + 2 * i)
        i_block = tl.load(block_ptr + 2 * i + 1)
        row = table_ptr + i_param * _COLUMNS
        p_param = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
        grad = tl.load(row + 1)
        p_avg = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(MOMENT)), 16)
        p_avg_sq = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(MOMENT)), 16)
        rounded = tl.load(row + 4)
        num_elements = tl.load(row + 6)
        correction1 = tl.load(correction_ptr + 2 * i_param)
        correction2 = tl.load(correction_ptr + 2 * i_param + 1)
        first = i_block.to(tl.int64) * (BLOCK * BLOCKS)
        last = tl.minimum(first + BLOCK * BLOCKS, num_elements)
        if tl.load(row + 7) != 0:
            p_grad = tl.multiple_of(grad.to(tl.pointer_type(GRAD_HALF)), 16)
            _update_part(
                p_param, p_grad, p_avg, p_avg_sq, rounded, first, last, lr, scale, correction1, correction2, beta1,
                beta2, eps, weight_decay, BLOCK, HALF,
            )  # fmt: skip
        else:
            p_full_grad = tl.multiple_of(grad.to(tl.pointer_type(tl.float32)), 16)
            _update_part(
                p_param, p_full_grad, p_avg, p_avg_sq, rounded, first, last, lr, scale, correction1, correction2, beta1,
                beta2, eps, weight_decay, BLOCK, HALF,
            )  # fmt: skip


@triton.jit
def adamw_corrections_kernel(
    table_ptr,  # [P, 8] int64
    correction_ptr,  # [P, 2] float32
    skip_ptr,  # 0-d float32
    num_params,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count a step of every parameter unless it is skipped, and make 1 - beta^step of it: in float64, for at the first
    steps the power is so near one that float32 would leave three digits of the difference."""
    o_p = tl.arange(0, BLOCK)
    mask = o_p < num_params
    p_step = tl.load(table_ptr + o_p * _COLUMNS + 5, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    b_step = tl.load(p_step, mask=mask, other=0.0) + (1.0 - tl.load(skip_ptr))
    tl.store(p_step, b_step, mask=mask)
    tl.store(correction_ptr + 2 * o_p, (1.0 - tl.exp(b_step.to(tl.float64) * LOG_BETA1)).to(tl.float32), mask=mask)
    tl.store(correction_ptr + 2 * o_p + 1, (1.0 - tl.exp(b_step.to(tl.float64) * LOG_BETA2)).to(tl.float32), mask=mask)


def make_table(params: Sequence[Tensor], *, part: int = _PROGRAM) -> AddressTable:
    """The table of these parameters' launches, in which a program works on `part` numbers, a multiple of 1,024."""
    assert part % _BLOCK == 0, "a part is whole blocks"
    sizes = [param.numel() for param in params]
    return AddressTable(sizes, params[0].device, part=part, num_columns=_COLUMNS.value)


def count_blocks(param: Tensor, part: int) -> int:
    """How many of the table's blocks are a parameter's; they come in the order of the parameters."""
    return triton.cdiv(param.numel(), part)


class Launch(NamedTuple):
    """What all launches over some parameters share."""

    table: AddressTable
    addresses: Tensor
    corrections: Tensor  # [P, 2] float32, written by `count_steps`
    lr: Tensor
    grad_scale: Tensor
    skip: Tensor
    options: AdamWOptions
    half: torch.dtype
    grad_half: torch.dtype
    reads_half: bool  # whether any gradient is of half precision
    moment: torch.dtype


def launch_all(launch: Launch, params: Sequence[Tensor]) -> None:
    """The step described, of all its parameters."""
    count_steps(launch)
    launch_blocks(launch, 0, len(launch.table.blocks))
    # The launch writes behind autograd's back.
    torch.autograd.graph.increment_version(list(params))


def describe(
    table: AddressTable,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    rounded: Sequence[Tensor | None],
    *,
    lr: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    options: AdamWOptions,
) -> Launch:
    """A step of `adamw_reference` for every parameter, in place, or of nothing where `skip` is not 0; to be launched by
    `launch_all`, or in pieces by `count_steps` once and then `launch_blocks`. Whoever does that tells autograd.

    The tensors are known by where they lie: keep them until the launch.

    Arguments:
        table: made for these parameters by `make_table`.
        params, grads, exp_avgs, exp_avg_sqs: contiguous float32, each beginning on 16 bytes; gradients may be of half
            precision instead, all that are of one type, and so may be all moments.
        steps: 0-d float32 each, the number of steps before this one, which is counted.
        rounded: tensors that are given the new values, or None; all of one type, which is float32 where a layer that
            trains in it keeps several weights as one matrix.
        lr, grad_scale, skip: 0-d float32 on the device.

    Raises:
        ValueError: a tensor is not contiguous and of these types on one device, or not aligned.
    """
    check_launchable("adamw", *params, *grads, lr, grad_scale, skip)
    halves = {copy.dtype for copy in rounded if copy is not None}
    assert len(halves) <= 1, "copies of one type a launch"
    check_addressable("adamw", *params)
    check_addressable("adamw", *grads, *exp_avgs, *exp_avg_sqs, dtypes=(torch.float32, torch.bfloat16, torch.float16))
    grad_halves = {grad.dtype for grad in grads if grad.dtype != torch.float32}
    assert len(grad_halves) <= 1, "half-precision gradients of one type a launch"
    assert len({moment.dtype for moment in (*exp_avgs, *exp_avg_sqs)}) == 1, "moments of one type a launch"
    rows = [
        (
            *(x.data_ptr() for x in tensors),
            0 if copy is None else copy.data_ptr(),
            step.data_ptr(),
            tensors[0].numel(),
            int(tensors[1].dtype != torch.float32),
        )
        for *tensors, copy, step in zip(params, grads, exp_avgs, exp_avg_sqs, rounded, steps, strict=True)
    ]
    return Launch(
        table,
        table.note(rows),
        torch.empty(len(params), 2, dtype=torch.float32, device=lr.device),
        lr,
        grad_scale,
        skip,
        options,
        next(iter(halves), torch.bfloat16),
        next(iter(grad_halves), torch.bfloat16),
        bool(grad_halves),
        exp_avgs[0].dtype,
    )


def log_beta(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else _SMALLEST_LOG


def triton_dtype(dtype: torch.dtype) -> Any:
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def count_steps(launch: Launch) -> None:
    """Count a step of every parameter, and make the corrections that `launch_blocks` reads."""
    num_params = len(launch.corrections)
    adamw_corrections_kernel[(1,)](
        launch.addresses,
        launch.corrections,
        launch.skip,
        num_params,
        LOG_BETA1=log_beta(launch.options.beta1),
        LOG_BETA2=log_beta(launch.options.beta2),
        BLOCK=triton.next_power_of_2(num_params),
        num_warps=4,
    )


def launch_blocks(launch: Launch, first: int, last: int) -> None:
    """Update what the table's blocks `first` to `last` stand for."""
    adamw_kernel[(last - first,)](
        launch.addresses,
        launch.table.blocks,
        launch.corrections,
        launch.lr,
        launch.grad_scale,
        launch.skip,
        first,
        *launch.options,
        BLOCK=_BLOCK,
        BLOCKS=launch.table.part // _BLOCK,
        HALF=triton_dtype(launch.half),
        GRAD_HALF=triton_dtype(launch.grad_half),
        MOMENT=triton_dtype(launch.moment),
        num_warps=1 if INTERPRETED else 4,
    )
