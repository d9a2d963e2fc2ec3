"""AdamW over any number of parameters in one launch: each number is read and written once.

Besides what torch's fused AdamW does, the launch scales the gradient (by the clipping factor, which costs a pass over
all gradients otherwise) and writes the parameter a second time in half precision, for the products of the next step.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.launch  # noqa: F401  before triton: it chooses the interpreter
from kernels.adamw.reference import AdamWOptions
from kernels.launch import INTERPRETED, check_launchable

_BLOCK = 1024  # numbers a program works on at a time
_BLOCKS = 8  # a program works on one after the other, having read once where its tensors lie
_PROGRAM = _BLOCK * _BLOCKS
_COLUMNS = tl.constexpr(6)  # of the table of addresses: see `AddressTable`


@triton.jit
def _update(
    p_param, p_grad, p_avg, p_avg_sq, rounded, first, last, lr, scale, correction1, correction2, beta1, beta2, eps,
    weight_decay, BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Elements first to last of one parameter."""
    for start in tl.range(first, last, BLOCK, num_stages=2):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < last
        b_grad = tl.load(p_grad + offsets, mask=mask, other=0.0) * scale
        b_param = tl.load(p_param + offsets, mask=mask, other=0.0)
        b_avg = tl.load(p_avg + offsets, mask=mask, other=0.0)
        b_avg_sq = tl.load(p_avg_sq + offsets, mask=mask, other=0.0)
        b_avg = beta1 * b_avg + (1.0 - beta1) * b_grad
        b_avg_sq = beta2 * b_avg_sq + (1.0 - beta2) * b_grad * b_grad
        b_denominator = tl.sqrt(b_avg_sq / correction2) + eps
        b_param = b_param * (1.0 - lr * weight_decay) - (lr / correction1) * b_avg / b_denominator
        tl.store(p_param + offsets, b_param, mask=mask)
        tl.store(p_avg + offsets, b_avg, mask=mask)
        tl.store(p_avg_sq + offsets, b_avg_sq, mask=mask)
        if rounded != 0:
            p_rounded = tl.multiple_of(rounded.to(tl.pointer_type(HALF)), 16)
            tl.store(p_rounded + offsets, b_param.to(HALF), mask=mask)


@triton.jit
def adamw_kernel(
    table_ptr,  # [P, 6] int64
    block_ptr,  # [programs, 2] int32: which parameter, and which part of it
    correction_ptr,  # [P, 2] float32: 1 - beta1^step, 1 - beta2^step
    lr_ptr,  # 0-d float32
    grad_scale_ptr,  # 0-d float32
    skip_ptr,  # 0-d float32
    beta1,
    beta2,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    HALF: tl.constexpr,
):
    if tl.load(skip_ptr) == 0.0:
        i_param = tl.load(block_ptr + 2 * tl.program_id(0))
        i_block = tl.load(block_ptr + 2 * tl.program_id(0) + 1)
        row = table_ptr + i_param * _COLUMNS
        p_param = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
        p_grad = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
        p_avg = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16)
        p_avg_sq = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
        rounded = tl.load(row + 4)
        num_elements = tl.load(row + 5)
        correction1 = tl.load(correction_ptr + 2 * i_param)
        correction2 = tl.load(correction_ptr + 2 * i_param + 1)
        lr = tl.load(lr_ptr)
        scale = tl.load(grad_scale_ptr)
        first = i_block.to(tl.int64) * (BLOCK * BLOCKS)
        last = tl.minimum(first + BLOCK * BLOCKS, num_elements)
        # A mask that ends on a multiple of four lets four numbers be read at once.
        if last % 4 == 0:
            _update(
                p_param, p_grad, p_avg, p_avg_sq, rounded, first, tl.multiple_of(last, 4), lr, scale, correction1,
                correction2, beta1, beta2, eps, weight_decay, BLOCK, HALF,
            )  # fmt: skip
        else:
            _update(
                p_param, p_grad, p_avg, p_avg_sq, rounded, first, last, lr, scale, correction1, correction2, beta1,
                beta2, eps, weight_decay, BLOCK, HALF,
            )  # fmt: skip


class AddressTable:
    """Where the tensors of P parameters lie, as the launch reads it.

    A row: addresses of the parameter, its gradient, its two averages and its half-precision copy (0 for none), and the
    number of elements. While a CUDA graph is recorded nothing can be sent to the device: the addresses
    are noted, and `upload` sends them afterwards.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        device = params[0].device
        assert not _recording(device), "a recorded launch needs a table made before"
        blocks = []
        for i, param in enumerate(params):
            count = torch.arange(-(-param.numel() // _PROGRAM), dtype=torch.int32, device=device)
            blocks.append(torch.stack([torch.full_like(count, i), count], 1))
        self.blocks = torch.cat(blocks)
        self.table = torch.zeros(len(params), _COLUMNS.value, dtype=torch.int64, device=device)
        self._noted: list[tuple[int, ...]] = []
        self._uploaded: list[tuple[int, ...]] = []

    def note(self, rows: list[tuple[int, ...]]) -> None:
        """Rows of the table for the next launch."""
        self._noted = rows
        if not _recording(self.table.device):
            self.upload()

    def upload(self) -> None:
        """Send the noted rows, if the device does not have them."""
        if self._noted != self._uploaded:
            rows = torch.tensor(self._noted, dtype=torch.int64)
            self.table.copy_(rows.pin_memory() if self.table.is_cuda else rows, non_blocking=True)
            self._uploaded = self._noted


def _recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def launch_adamw(
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
) -> None:
    """`adamw_reference` for every parameter, in place, or nothing where `skip` is not 0.

    Arguments:
        table: made for these parameters.
        params, grads, exp_avgs, exp_avg_sqs: contiguous float32, each beginning on 16 bytes.
        steps: 0-d float32 each, the number of this step from 1 on.
        rounded: tensors that are given the new values, or None; all of one type, which is float32 where a layer that
            trains in it keeps several weights as one matrix.
        lr, grad_scale, skip: 0-d float32 on the device.

    Raises:
        ValueError: a tensor is not contiguous float32 on one device, or not aligned.
    """
    check_launchable("adamw", *params, *grads, lr, grad_scale, skip)
    halves = {copy.dtype for copy in rounded if copy is not None}
    assert len(halves) <= 1, "copies of one type a launch"
    rows = []
    for param, grad, avg, avg_sq, copy in zip(params, grads, exp_avgs, exp_avg_sqs, rounded, strict=True):
        addresses = [x.data_ptr() for x in (param, grad, avg, avg_sq)]
        for x in (param, grad, avg, avg_sq):
            if x.dtype != torch.float32 or not x.is_contiguous() or x.data_ptr() % 16:
                raise ValueError(
                    f"adamw: a tensor of shape {tuple(x.shape)} is {x.dtype} at {x.data_ptr() % 16} bytes past a "
                    "multiple of 16; the launch needs contiguous float32 that begins on one"
                )
        rows.append((*addresses, 0 if copy is None else copy.data_ptr(), param.numel()))
    table.note(rows)
    # 1 - beta^step as -expm1(step log beta): at the first steps the power is so near one that float32 would leave three
    # digits of the difference.
    count = torch.stack(list(steps)).double()
    logs = [math.log(beta) if beta > 0.0 else -math.inf for beta in (options.beta1, options.beta2)]
    corrections = torch.stack([-torch.expm1(count * log) for log in logs], 1).float()
    kinds = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    half = kinds[next(iter(halves), torch.bfloat16)]
    adamw_kernel[(len(table.blocks),)](
        table.table,
        table.blocks,
        corrections,
        lr,
        grad_scale,
        skip,
        options.beta1,
        options.beta2,
        options.eps,
        options.weight_decay,
        BLOCK=_BLOCK,
        BLOCKS=_BLOCKS,
        HALF=half,
        num_warps=1 if INTERPRETED else 4,
    )
    # The launch writes behind autograd's back.
    torch.autograd.graph.increment_version(list(params))
