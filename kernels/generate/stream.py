"""The order in which a program reads its weights: one stream of tiles from the first token to the last.

Weights depend on no activation, so a program asks for tile after tile across the borders of phases and tokens, as far
ahead as its shared memory reaches; a barrier between phases stops the arithmetic and not the memory. A tile is R rows
of KC channels of this program's share of a matrix: first the chunks of a row's channels, then the other half of a pair
(drive and gate, SwiGLU's two), then the next rows, then the next matrix.

Tiles are laid out beforehand, each contiguous, so that the tensor memory accelerator fetches one by its number. No
thread then has a copy of its own in flight, which a barrier's fence would wait for.

The order is written down once for each program, as two words a tile: its number, for asking, and what it is, for
using. A kernel that worked it out instead would spend more on that than on the products.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import functools

import torch
import triton.language as tl
from torch import Tensor

from kernels.generate.layout import BrainShape

# What a phase multiplies by.
CORTEX_IN = tl.constexpr(0)
MEMORY_IN = tl.constexpr(1)
OUT = tl.constexpr(2)
MLP_IN = tl.constexpr(3)
MLP_OUT = tl.constexpr(4)
DECODE = tl.constexpr(5)

_NO_TILE = 2**24


@functools.lru_cache(maxsize=16)
def stream_table(
    shape: BrainShape, num_programs: int, rows: int, channels: int, device: torch.device, *, together: int = 0
) -> Tensor:
    """`[P, T, 2]` int64 on the device, T turns a token: the tile's number in the order of `tile_weights`, past the last
    where there is nothing to read (zeros then come without reading), and what it is, for using (see the kernel).

    Arguments:
        together: 0 for one tile a turn; otherwise so many of a row's tiles are one turn, how many there are stands in
            bits 32 and up of the first word, and activations are gathered in each turn that needs others than the last.
    """
    program = torch.arange(num_programs)
    fetch, use = [], []
    base = 0
    gated = shape.num_wernicke + shape.num_memory if shape.go_gate else -1
    for kind, layer, _, num_rows, width_in, halves in matrices_in_order(shape):
        num_units = -(-num_rows // rows)
        num_chunks = -(-width_in // channels)
        each = -(-num_units // num_programs)
        for row in range(each):
            unit = program * each + row
            left = (num_rows - unit * rows).clamp(0, rows)
            for half in range(halves):
                for chunk in range(0, num_chunks, together or 1):
                    starts = row == half == chunk == 0 or (together > 0 and num_chunks > together)
                    ends_rows = chunk + (together or 1) >= num_chunks
                    ends = ends_rows and half == halves - 1 and row == each - 1
                    # Who has no rows gathers nothing, unless it has other work: memory units and gates.
                    others = kind == MEMORY_IN.value or (kind == CORTEX_IN.value and layer == gated)
                    begins = starts & ((left > 0) | (others or not together))
                    sends = ends_rows & ((left > 0) | (ends or not together))
                    tile = base + (half * num_units + unit) * num_chunks + chunk
                    if together:
                        tile = tile | min(together, num_chunks - chunk) << 32
                    fetch.append(torch.where(left > 0, tile, _NO_TILE))
                    place = chunk // (together or 1)
                    what = ends << 2 | half << 3 | kind << 4 | place << 8 | layer << 24
                    flags = what | begins.long() | sends.long() << 1
                    use.append(flags | left << 14 | unit * rows << 36)
        base += halves * num_units * num_chunks
    return torch.stack([torch.stack(fetch, 1), torch.stack(use, 1)], 2).to(device)


def tile_weights(
    shape: BrainShape, matrices: Tensor, decoder: Tensor, rows: int, outer: int, inner: int, slice_channels: int
) -> Tensor:
    """All matrices cut into tiles `[N, outer, rows, inner, slice_channels]`, each contiguous, filled up with zeros: for
    each matrix (or half of a pair) the blocks of rows, for each block the chunks of its channels."""
    channels = outer * inner * slice_channels
    pieces = []
    for kind, _, offset, num_rows, width_in, halves in matrices_in_order(shape):
        flat = decoder.reshape(-1) if kind == DECODE.value else matrices
        for half in range(halves):
            first = offset + half * num_rows * width_in
            matrix = flat[first : first + num_rows * width_in].view(num_rows, width_in)
            padded = torch.nn.functional.pad(matrix, (0, -width_in % channels, 0, -num_rows % rows))
            cut = padded.view(-1, rows, padded.shape[1] // channels, outer, inner, slice_channels)
            pieces.append(cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, outer, rows, inner, slice_channels))
    return torch.cat(pieces)


def turn_scales(shape: BrainShape, table: Tensor, scales: Tensor, rows: int) -> Tensor:
    """The scales of a turn's rows, `[P, T, rows]`, of one for each row of the matrices and then of the decoder; 0 past
    the last row. The table is that of `stream_table`."""
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


def matrices_in_order(shape: BrainShape) -> list[tuple[int, int, int, int, int, int]]:
    """In the order they are read: what a matrix is for, its layer, its offset in `matrices`, its rows, its channels and
    whether it is a pair."""
    width, mlp_width = shape.width, shape.mlp_width
    order, offset = [], 0
    num_layers = shape.num_cortex + shape.num_memory
    for layer in range(num_layers):
        if shape.num_wernicke <= layer < shape.num_wernicke + shape.num_memory:
            first = (MEMORY_IN.value, 4 * width, width, 1)
        else:
            first = (CORTEX_IN.value, width, width, 2)
        rest = [(OUT.value, width, width, 1), (MLP_IN.value, mlp_width, width, 2), (MLP_OUT.value, width, mlp_width, 1)]
        for kind, num_rows, width_in, halves in [first, *rest]:
            order.append((kind, layer, offset, num_rows, width_in, halves))
            offset += num_rows * width_in * halves
    order.append((DECODE.value, num_layers, 0, shape.vocab_size, width, 1))
    return order
