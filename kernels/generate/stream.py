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
def stream_table(shape: BrainShape, num_programs: int, rows: int, channels: int, device: torch.device) -> Tensor:
    """`[P, T, 2]` int64 on the device, T tiles a token: the tile's number in the order of `tile_weights`, past the last
    where there is nothing to read (zeros then come without reading), and what it is, for using (see the kernel)."""
    program = torch.arange(num_programs)
    fetch, use = [], []
    base = 0
    for kind, layer, _, num_rows, width_in, halves in matrices_in_order(shape):
        num_units = -(-num_rows // rows)
        num_chunks = -(-width_in // channels)
        each = -(-num_units // num_programs)
        for row in range(each):
            unit = program * each + row
            left = (num_rows - unit * rows).clamp(0, rows)
            for half in range(halves):
                for chunk in range(num_chunks):
                    begins = row == half == chunk == 0
                    ends_rows = chunk == num_chunks - 1
                    ends = ends_rows and half == halves - 1 and row == each - 1
                    tile = base + (half * num_units + unit) * num_chunks + chunk
                    fetch.append(torch.where(left > 0, tile, _NO_TILE))
                    flags = begins | ends_rows << 1 | ends << 2 | half << 3 | kind << 4 | chunk << 8 | layer << 24
                    use.append(flags | left << 14 | unit * rows << 36)
        base += halves * num_units * num_chunks
    return torch.stack([torch.stack(fetch, 1), torch.stack(use, 1)], 2).to(device)


def tile_weights(
    shape: BrainShape, matrices: Tensor, decoder: Tensor, rows: int, slices: int, slice_channels: int
) -> Tensor:
    """All matrices cut into tiles `[N, slices, rows, slice_channels]`, each contiguous, filled up with zeros: for each
    matrix (or half of a pair) the blocks of rows, for each block the chunks of its channels."""
    channels = slices * slice_channels
    pieces = []
    for kind, _, offset, num_rows, width_in, halves in matrices_in_order(shape):
        flat = decoder.reshape(-1) if kind == DECODE.value else matrices
        for half in range(halves):
            first = offset + half * num_rows * width_in
            matrix = flat[first : first + num_rows * width_in].view(num_rows, width_in)
            padded = torch.nn.functional.pad(matrix, (0, -width_in % channels, 0, -num_rows % rows))
            cut = padded.view(-1, rows, padded.shape[1] // channels, slices, slice_channels)
            pieces.append(cut.permute(0, 2, 3, 1, 4).reshape(-1, slices, rows, slice_channels))
    return torch.cat(pieces)


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
