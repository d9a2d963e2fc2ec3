"""The order in which the launch for one lane reads its weights, warp by warp.

A turn is R rows of one matrix times the channels of some granules: what warps multiply between asking for weights and
asking for the next. Granules are G channels, which a warp reads from shared memory in one go, 16 bytes a thread. Of a
turn each of W warps has rows of its own, and what it needs of them lies together in memory: for each block of R rows,
for each warp, for each granule, R / W rows of G channels, a piece.

The order is written down once for each program, as two words a turn: where its weights lie, for asking, and what it is,
for using. A kernel that worked it out instead would spend more on that than on the products.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import functools
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


@functools.lru_cache(maxsize=16)
def turn_table(
    shape: BrainShape,
    num_programs: int,
    rows: int,
    num_warps: int,
    channels: int,
    granules: int,
    unit: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """`[P, T, 2]` int64 on the device and `[P]` int32: the turns that a program takes for a token, and how many it has
    of the T that there is room for. A program takes no part in a phase of which it has no rows, nor other work.

    The first word says where the weights lie, in pieces of R / W rows of G channels: bits 0 to 31 where the first
    warp's begin, 32 to 47 how many pieces further each next warp's do, 48 to 55 how many there are; 0 where the
    program has no rows. Bit 56 says that the rows are neurons, which need more than their weights. The second word
    says what they are, for using (see the kernel).

    Arguments:
        rows, num_warps: R and W. channels: of a granule. granules: of a turn, at most. unit: value channels of a unit
            of memory.
    """
    fetch, use, taken = [], [], []
    base = 0
    for phase in deal(shape, num_programs, rows, shape.width // unit):
        num_blocks = -(-phase.num_rows // rows)
        num_pieces = -(-phase.width_in // channels)
        num_chunks = -(-num_pieces // granules)
        for i in range(max(1, int(phase.rounds.max()))):
            block = i * num_programs + phase.rank
            has_rows = i < phase.rounds
            left = (phase.num_rows - block * rows).clamp(0, rows)
            for half in range(phase.halves):
                for chunk in range(num_chunks):
                    is_first = i == half == chunk == 0
                    alone = is_first & phase.attends & ~has_rows
                    begins = (has_rows & (is_first or num_chunks > 1)) | (alone & (phase.kind != DECODE.value))
                    sends = has_rows & (chunk == num_chunks - 1)
                    ends = (sends & (half == phase.halves - 1) & (i + 1 == phase.rounds)) | alone
                    first = base + (half * num_blocks + block) * num_warps * num_pieces + chunk * granules
                    count = min(granules, num_pieces - chunk * granules)
                    is_neurons = phase.kind == CORTEX_IN.value and half == chunk == 0
                    where = first | num_pieces << 32 | count << 48 | is_neurons << 56
                    fetch.append(torch.where(has_rows, where, 0))
                    what = half << 3 | phase.kind << 4 | chunk << 8 | phase.layer << 24
                    use.append(what | begins.long() | sends.long() << 1 | ends.long() << 2 | left << 14 | block * rows << 36)
                    taken.append(has_rows | alone)
        base += phase.halves * num_blocks * num_warps * num_pieces
    is_taken = torch.stack(taken, 1)
    num_turns = is_taken.sum(1)
    order = (~is_taken).long().argsort(dim=1, stable=True)[:, : int(num_turns.max())]
    words = torch.stack([torch.stack(fetch, 1).gather(1, order), torch.stack(use, 1).gather(1, order)], 2)
    words[torch.arange(words.shape[1]) >= num_turns[:, None]] = 0
    return words.to(device), num_turns.to(torch.int32).to(device)


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


def turn_scales(shape: BrainShape, table: Tensor, scales: Tensor, rows: int) -> Tensor:
    """The scales of a turn's rows, `[P, T, rows]`, of one for each row of the matrices and then of the decoder; 0 past
    the last row. The table is that of `turn_table`."""
    use = table[..., 1]
    layer, kind, half, left = (use >> 24) & 4095, (use >> 4) & 7, (use >> 3) & 1, (use >> 14) & 1023
    first_row = torch.zeros(shape.num_cortex + shape.num_memory + 1, 6, dtype=torch.int64)
    rows_of_half = torch.zeros_like(first_row)
    total = 0
    for of_kind, of_layer, _, num_rows, _, halves in matrices_in_order(shape):
        first_row[of_layer, of_kind], rows_of_half[of_layer, of_kind] = total, num_rows
        total += num_rows * halves
    first_row, rows_of_half = first_row.to(table.device), rows_of_half.to(table.device)
    start = first_row[layer, kind] + half * rows_of_half[layer, kind] + (use >> 36)
    row = torch.arange(rows, device=table.device)
    index = (start[..., None] + row).clamp(max=len(scales) - 1)
    return torch.where(row < left[..., None], scales[index], 0.0)
