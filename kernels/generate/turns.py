"""The order in which the launch for one lane reads its weights, warp by warp.

A portion is R rows of one matrix times the channels of some granules: what is asked for at once. Granules are G
channels, which a warp reads from shared memory in one go, 16 bytes a thread. Of a portion each of W warps has rows of
its own, and what it needs of them lies together in memory: for each block of R rows, for each warp, for each granule,
R / W rows of G channels, a piece.

A turn is what is multiplied in one go, since what a turn costs besides its products is as much as they are: both
matrices of a pair, two blocks of rows, or, of channels that are more than a portion's, several portions of one block.

The order is written down once for each program, a word for each portion, for asking, and one for each turn, for using.
A kernel that worked it out instead would spend more on that than on the products.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.generate.layout import BrainShape
from kernels.generate.matrix_order import CORTEX_IN, DECODE, MEMORY_IN, MLP_OUT, OUT, matrices_in_order


class Phase(NamedTuple):
    """A matrix, and who multiplies by it: block i * P + rank[p] of its rows is program p's i-th, for i < rounds[p]."""

    kind: int
    layer: int
    num_rows: int
    width_in: int
    halves: int
    rank: Tensor  # [P]
    rounds: Tensor  # [P]
    attends: Tensor  # [P], who has something to do besides


def deal(shape: BrainShape, num_programs: int, rows: int, num_units: int) -> list[Phase]:
    """Deal the blocks of rows of all matrices out so that programs read as many bytes of a token as can be.

    What is left over of a matrix when every program has had as many blocks goes to those that have read least so far.
    A program that begins with the same ones each time would read a tenth more than the mean, and all wait for it.

    Arguments:
        rows: of a block. num_units: units of memory, of which each program p < num_units has its own to read and write.
    """
    program = torch.arange(num_programs)
    order = matrices_in_order(shape)
    state_bytes = 8 * shape.width * shape.head_width // num_units  # float32, read and written
    lateral_bytes = 4 * rows * shape.column_width
    gated = shape.num_wernicke + shape.num_memory if shape.go_gate else -1
    gates = program >= num_programs - shape.num_columns  # as `send_gates` has it
    has_unit = program < num_units

    def dealt(num_rows: int, rank: Tensor) -> Tensor:
        return (-(-num_rows // rows) - rank + num_programs - 1).div(num_programs, rounding_mode="floor").clamp(min=0)

    def read_by(num_rows: int, width_in: int, halves: int, rank: Tensor) -> Tensor:
        return dealt(num_rows, rank) * (2 * rows * width_in * halves)  # in proportion, whatever the type

    # The draw takes ids as they lie.
    _, _, _, num_rows, width_in, halves = order[-1]
    load = read_by(num_rows, width_in, halves, program)
    load += shape.num_memory * state_bytes * has_unit
    phases: list[Phase] = []
    for kind, layer, _, num_rows, width_in, halves in order:
        attends = torch.zeros(num_programs, dtype=torch.bool)
        if kind == DECODE.value:
            rank, attends = program, ~attends
        elif kind == OUT.value and phases[-1].kind == CORTEX_IN.value:
            rank = phases[-1].rank  # whose spikes it writes to the state
        else:
            key = load
            if kind in (OUT.value, MLP_OUT.value):
                # Who adds to x must have received it, as who had rows of the phase before has.
                key = load + (phases[-1].rounds == 0) * (load.max() + 1)
            rank = torch.empty_like(program)
            rank[key.argsort(stable=True)] = program
        rounds = dealt(num_rows, rank)
        if kind in (OUT.value, MLP_OUT.value):
            phases[-1].attends.logical_or_(rounds > 0)
        elif kind == MEMORY_IN.value:
            attends = has_unit
        elif kind == CORTEX_IN.value:
            load = load + rounds.clamp(max=1) * lateral_bytes
            if layer == gated:
                attends = gates
        if kind != DECODE.value:
            load = load + read_by(num_rows, width_in, halves, rank)
        phases.append(Phase(kind, layer, num_rows, width_in, halves, rank, rounds, attends.clone()))
    return phases


class TurnTable(NamedTuple):
    """A token's portions and turns, program by program.

    `portions` `[P, F]` int64 says where weights lie, in pieces of R / W rows of G channels: bits 0 to 31 where the
    first warp's begin, 32 to 47 how many pieces further each next warp's do, 48 and up how many there are.

    `turns` `[P, T]` int64: bit 0 whether activations are to be gathered first, 1 whether sums leave, 2 whether the
    program is done with the phase, 3 which of a pair of matrices it is if there is one portion or more of one alone, 4
    to 6 the kind of phase, 7 whether its portions are of different channels, 8 to 13 the first portion's place among
    the channels, 14 to 23 rows of the block, 24 to 35 the layer, 36 to 59 the first row, 60 to 62 how many portions. A
    second block of rows is R times P rows further on.

    `counts` `[P, 2]` int32: how many of F and T a program has.
    """

    portions: Tensor
    turns: Tensor
    counts: Tensor


@functools.lru_cache(maxsize=16)
def turn_table(
    shape: BrainShape, num_programs: int, rows: int, num_warps: int, channels: int, granules: int, unit: int, most: int
) -> TurnTable:
    """A program takes no part in a phase of which it has no rows, nor other work.

    Arguments:
        rows, num_warps: R and W. channels: of a granule. granules: of a portion, at most. unit: value channels of a
            unit of memory. most: portions of a turn, at most 7.
    """
    portions, turns = [], []
    base = 0
    for phase in deal(shape, num_programs, rows, shape.width // unit):
        num_blocks = -(-phase.num_rows // rows)
        num_pieces = -(-phase.width_in // channels)
        num_chunks = -(-num_pieces // granules)
        num_rounds = int(phase.rounds.max())
        is_chunked = num_chunks > 1

        for i, half, chunk in itertools.product(range(num_rounds), range(phase.halves), range(num_chunks)):
            block = half * num_blocks + i * num_programs + phase.rank
            first = base + block * num_warps * num_pieces + chunk * granules
            count = min(granules, num_pieces - chunk * granules)
            portions.append((first | num_pieces << 32 | count << 48, i < phase.rounds))
        base += phase.halves * num_blocks * num_warps * num_pieces

        # A turn: its first round, half and chunk, and how many rounds, halves and chunks it has.
        if is_chunked:
            sizes = (1, 1, min(most, num_chunks))
        elif phase.halves == 2:
            sizes = (1, min(most, 2), 1)
        elif phase.kind in (MEMORY_IN.value, DECODE.value):
            sizes = (min(most, 2), 1, 1)
        else:
            sizes = (1, 1, 1)
        starts = [range(0, n, size) for n, size in zip((max(num_rounds, 1), phase.halves, num_chunks), sizes)]
        for i, half, chunk in itertools.product(*starts):
            num = (phase.rounds - i).clamp(0, sizes[0]) * sizes[1] * min(sizes[2], num_chunks - chunk)
            is_first = i == half == chunk == 0
            alone = (num == 0) & phase.attends & is_first
            sends = (num > 0) & (half + sizes[1] == phase.halves) & (chunk + sizes[2] >= num_chunks)
            ends = alone | (sends & (phase.rounds <= i + sizes[0]))
            begins = is_first & ((num > 0) | (alone & (phase.kind != DECODE.value)))
            row = (i * num_programs + phase.rank) * rows
            what = half << 3 | phase.kind << 4 | is_chunked << 7 | chunk << 8 | phase.layer << 24
            word = what | begins.long() | sends.long() << 1 | ends.long() << 2
            word |= (phase.num_rows - row).clamp(0, rows) << 14 | row << 36 | num << 60
            turns.append((word, (num > 0) | alone))
    first_portion, first_turn = _packed(portions), _packed(turns)
    counts = torch.stack([first_portion[1], first_turn[1]], 1)
    return TurnTable(first_portion[0], first_turn[0], counts.to(torch.int32))


def _packed(words: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of words `[P]`, and who has them, each program's without gaps, `[P, most]`, zeros behind them, and how many."""
    word, has = (torch.stack(parts, 1) for parts in zip(*words))
    num = has.sum(1)
    order = (~has).long().argsort(dim=1, stable=True)[:, : int(num.max())]
    return word.gather(1, order) * has.gather(1, order), num


def in_pieces(shape: BrainShape, matrices: Tensor, decoder: Tensor, rows: int, num_warps: int, channels: int) -> Tensor:
    """All matrices cut into the pieces of `turn_table`, `[pieces, R / W, G]`, filled up with zeros."""
    pieces = []
    for kind, _, offset, num_rows, width_in, halves in matrices_in_order(shape):
        flat = decoder.reshape(-1) if kind == DECODE.value else matrices
        for half in range(halves):
            first = offset + half * num_rows * width_in
            matrix = flat[first : first + num_rows * width_in].view(num_rows, width_in)
            padded = torch.nn.functional.pad(matrix, (0, -width_in % channels, 0, -num_rows % rows))
            cut = padded.view(-1, rows // num_warps, padded.shape[1] // channels, channels)
            pieces.append(cut.transpose(1, 2).reshape(-1, rows // num_warps, channels))
    return torch.cat(pieces)


def turn_scales(shape: BrainShape, table: TurnTable, scales: Tensor, rows: int) -> Tensor:
    """The scales of what leaves at a turn, `[P, T, 2, rows]`, of one for each row of the matrices and then of the
    decoder; 0 past the last row. The second are those of the pair's other matrix, or of the second block of rows."""
    use = table.turns
    layer, kind, first = (use >> 24) & 4095, (use >> 4) & 7, (use >> 36) & 0xFFFFFF
    start = torch.zeros(shape.num_cortex + shape.num_memory + 1, 6, dtype=torch.int64)
    rows_of_half, num_halves = torch.zeros_like(start), torch.zeros_like(start)
    total = 0
    for of_kind, of_layer, _, num_rows, _, halves in matrices_in_order(shape):
        at = (of_layer, of_kind)
        start[at], rows_of_half[at], num_halves[at] = total, num_rows, halves
        total += num_rows * halves
    has_rows, is_pair = rows_of_half[layer, kind], num_halves[layer, kind] == 2
    second = torch.where(is_pair, 0, len(use) * rows)  # how many rows further
    row = torch.stack([first, first + second], 2)[..., None] + torch.arange(rows)
    index = start[layer, kind][..., None, None] + row
    index[:, :, 1] += torch.where(is_pair, has_rows, 0)[..., None]
    index = index.clamp(max=len(scales) - 1)
    is_there = (row < has_rows[..., None, None]) & ((use >> 1) & 1 == 1)[..., None, None]
    return torch.where(is_there.to(scales.device), scales[index.to(scales.device)], 0.0)
