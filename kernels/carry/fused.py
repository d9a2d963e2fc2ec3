"""All tensors of a state in one launch: what was read is kept, and what comes out takes its place.

A launch sees words of 32 bits. Which of them are numbers that are not finite it tells by their exponent: all ones.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.launch  # noqa: F401  before triton: it chooses the interpreter
from kernels.addresses import AddressTable, Row, check_addressable
from kernels.launch import INTERPRETED, check_launchable

_BLOCK = 1024  # words a program works on at a time
_PART = 4 * _BLOCK  # and in all
# Of the table: addresses of what is kept, of the tensor and of its next value, the number of words, and the bits of the
# exponent in each half of a word, of which the upper one alone is looked at in numbers as long as a word.
_COLUMNS = tl.constexpr(7)
_EXPONENTS = {
    torch.int64: (0, 0, 0),
    torch.int32: (0, 0, 0),
    torch.float32: (0x7F800000, 0, 1),
    torch.bfloat16: (0x7F800000, 0x7F80, 0),
    torch.float16: (0x7C000000, 0x7C00, 0),
}


@triton.jit
def _carry(p_kept, p_own, p_new, first, last, upper, lower, whole, BLOCK: tl.constexpr):
    for start in range(first, last, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < last
        b_new = tl.load(p_new + offsets, mask=mask, other=0)
        tl.store(p_kept + offsets, tl.load(p_own + offsets, mask=mask, other=0), mask=mask)
        b_upper = (upper != 0) & ((b_new & upper) == upper)
        b_lower = (lower != 0) & ((b_new & lower) == lower)
        b_keep = tl.where(b_upper, 0xFFFF, -1) & tl.where(b_lower, -0x10000, -1)
        tl.store(p_own + offsets, tl.where(b_upper & whole, 0, b_new & b_keep), mask=mask)


@triton.jit
def carry_kernel(
    table_ptr,  # [P, 7] int64
    block_ptr,  # [programs, 2] int32: which tensor, and which part of it
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    row = table_ptr + tl.load(block_ptr + 2 * tl.program_id(0)) * _COLUMNS
    p_kept = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int32)), 16)
    p_own = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int32)), 16)
    p_new = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.int32)), 16)
    upper, lower = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    whole = tl.load(row + 6) != 0
    first = tl.load(block_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * PART
    last = tl.minimum(first + PART, tl.load(row + 3))
    # A mask that ends on a multiple of four lets four words be read at once. A product says so, not `tl.multiple_of`:
    # that is believed of `last` in the other branch as well.
    if last % 4 == 0:
        _carry(p_kept, p_own, p_new, first, last // 4 * 4, upper, lower, whole, BLOCK)
    else:
        _carry(p_kept, p_own, p_new, first, last, upper, lower, whole, BLOCK)


def make_table(own: Sequence[Tensor]) -> AddressTable:
    """The table of launches on these tensors."""
    return AddressTable([_num_words(x) for x in own], own[0].device, part=_PART, num_columns=_COLUMNS.value)


def carry_fused(table: AddressTable, kept: Sequence[Tensor], own: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """`carry_reference` in one launch.

    Arguments:
        table: made for `own`.
        kept, own, new: tensors alike, contiguous, each beginning on 16 bytes; float32, half precision with an even
            number of elements, or integers of 4 or 8 bytes.

    Raises:
        ValueError: a tensor is of another type, not contiguous, or not aligned.
    """
    check_launchable("carry", *own, *new)
    check_addressable("carry", *kept, *own, *new, dtypes=tuple(_EXPONENTS))
    rows: list[Row] = []
    for before, x, after in zip(kept, own, new, strict=True):
        assert before.shape == x.shape == after.shape, "the tensors of a step's state keep their shapes"
        assert before.dtype == x.dtype == after.dtype, "and their types"
        rows.append((before.data_ptr(), x.data_ptr(), after.data_ptr(), _num_words(x), *_EXPONENTS[x.dtype]))
    addresses = table.note(rows)
    carry_kernel[(len(table.blocks),)](
        addresses, table.blocks, BLOCK=_BLOCK, PART=_PART, num_warps=1 if INTERPRETED else 4
    )


def _num_words(x: Tensor) -> int:
    num_bytes = x.numel() * x.element_size()
    if num_bytes % 4:
        raise ValueError(f"carry: a tensor of shape {tuple(x.shape)} in {x.dtype} is not a whole number of words")
    return num_bytes // 4
