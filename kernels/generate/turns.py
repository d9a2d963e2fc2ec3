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

import torch
from torch import Tensor

from kernels.generate.layout import BrainShape
from kernels.generate.matrix_order import CORTEX_IN, DECODE, MEMORY_IN, matrices_in_order


@functools.lru_cache(maxsize=16)
def turn_table(
    shape: BrainShape, num_programs: int, rows: int, num_warps: int, channels: int, granules: int, device: torch.device
) -> Tensor:
    """`[P, T, 2]` int64 on the device, T turns a token. Blocks of rows are dealt out in turn, so that all programs
    together read a matrix from its beginning to its end.

    The first word says where the weights lie, in pieces of R / W rows of G channels: bits 0 to 31 where the first
    warp's begin, 32 to 47 how many pieces further each next warp's do, 48 and up how many there are; 0 where the
    program has no rows. The second says what they are, for using (see the kernel).

    Arguments:
        rows, num_warps: R and W. channels: of a granule. granules: of a turn, at most.
    """
    program = torch.arange(num_programs)
    fetch, use = [], []
    base = 0
    gated = shape.num_wernicke + shape.num_memory if shape.go_gate else -1
    for kind, layer, _, num_rows, width_in, halves in matrices_in_order(shape):
        num_units = -(-num_rows // rows)
        num_pieces = -(-width_in // channels)
        num_chunks = -(-num_pieces // granules)
        each = -(-num_units // num_programs)
        for row in range(each):
            unit = row * num_programs + program
            left = (num_rows - unit * rows).clamp(0, rows)
            for half in range(halves):
                for chunk in range(num_chunks):
                    starts = row == half == chunk == 0 or num_chunks > 1
                    ends_rows = chunk == num_chunks - 1
                    ends = ends_rows and half == halves - 1 and row == each - 1
                    # Who has no rows gathers nothing, unless it has other work: memory units and gates.
                    others = kind == MEMORY_IN.value or (kind == CORTEX_IN.value and layer == gated)
                    begins = starts & ((left > 0) | others)
                    sends = ends_rows & ((left > 0) | ends)
                    first = base + (half * num_units + unit) * num_warps * num_pieces + chunk * granules
                    count = min(granules, num_pieces - chunk * granules)
                    fetch.append(torch.where(left > 0, first | num_pieces << 32 | count << 48, 0))
                    what = ends << 2 | half << 3 | kind << 4 | chunk << 8 | layer << 24
                    use.append(what | begins.long() | sends.long() << 1 | left << 14 | unit * rows << 36)
        base += halves * num_units * num_warps * num_pieces
    return torch.stack([torch.stack(fetch, 1), torch.stack(use, 1)], 2).to(device)


def count_turns(shape: BrainShape, num_programs: int, rows: int, channels: int, granules: int) -> int:
    """Turns of a token, T."""
    total = 0
    for _, _, _, num_rows, width_in, halves in matrices_in_order(shape):
        each = -(-num_rows // (rows * num_programs))
        total += each * halves * -(-width_in // (channels * granules))
    return total


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
