"""The order in which a program reads its weights: one stream of tiles from the first token to the last.

Weights depend on no activation, so a program asks for tile after tile across the borders of phases and tokens, as far
ahead as its shared memory reaches; a barrier between phases stops the arithmetic and not the memory. A tile is R rows
of KC channels of this program's share of a matrix: first the chunks of a row's channels, then the other half of a pair
(drive and gate, SwiGLU's two), then the next rows, then the next matrix.

The order is written down once for each program, as two words a tile: where it lies, for asking, and what it is, for
using. A kernel that worked it out instead would spend more on that than on the products.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import functools

import torch
import triton
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

MAX_ROWS = 512  # of a tile, and MAX_CHUNKS of a row, as a word holds them
MAX_CHUNKS = 63


@functools.lru_cache(maxsize=16)
def stream_table(shape: BrainShape, num_programs: int, rows: int, channels: int, device: torch.device) -> Tensor:
    """`[P, T, 2]` int64 on the device, T tiles a token; see `fetch_tile` and `Tile` for the two words."""
    width, mlp_width = shape.width, shape.mlp_width
    program = torch.arange(num_programs)
    fetch, use = [], []

    def add(kind: int, layer: int, base: int, num_rows: int, width_in: int, pair: int = 0) -> None:
        each = -(-num_rows // num_programs)
        num_chunks = -(-width_in // channels)
        halves = 2 if pair else 1
        for row in range(0, each, rows):
            first = program * each + row
            left = (torch.minimum(first + each - row, torch.tensor(num_rows)) - first).clamp(0, rows)
            for half in range(halves):
                for chunk in range(num_chunks):
                    starts = row == half == chunk == 0
                    ends_rows = chunk == num_chunks - 1
                    ends = ends_rows and half == halves - 1 and row + rows >= each
                    offset = base + half * pair + first * width_in + chunk * channels
                    offset = torch.where(left > 0, offset, 0)
                    inside = min(channels, width_in - chunk * channels) // 16
                    what = inside << 12 | (kind == DECODE.value) << 11 | (kind == MLP_OUT.value) << 10
                    fetch.append(offset // 16 << 24 | what | left)
                    flags = starts | ends_rows << 1 | ends << 2 | half << 3 | kind << 4 | chunk << 8 | layer << 24
                    use.append(flags | left << 14 | first << 36)

    base = 0
    for layer in range(shape.num_cortex + shape.num_memory):
        if shape.num_wernicke <= layer < shape.num_wernicke + shape.num_memory:
            add(MEMORY_IN.value, layer, base, 4 * width, width)
            base += 4 * width**2
        else:
            add(CORTEX_IN.value, layer, base, width, width, pair=width**2)
            base += 2 * width**2
        add(OUT.value, layer, base, width, width)
        base += width**2
        add(MLP_IN.value, layer, base, mlp_width, width, pair=mlp_width * width)
        base += 2 * mlp_width * width
        add(MLP_OUT.value, layer, base, width, mlp_width)
        base += mlp_width * width
    add(DECODE.value, shape.num_cortex + shape.num_memory, 0, shape.vocab_size, width)
    return torch.stack([torch.stack(fetch, 1), torch.stack(use, 1)], 2).to(device)


@triton.jit
def fetch_tile(
    p_matrices, p_decoder, word,
    D: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """The tile of weights that a first word names, [NB, R, KS]. The word: rows (10 bits), whether rows are M channels
    long, whether it is the decoder's, channels in units of 16 (12 bits), and the place in units of 16 weights."""
    o_r = tl.arange(0, R)[None, :, None]
    o_k = tl.arange(0, NB)[:, None, None] * KS + tl.arange(0, KS)[None, None, :]
    flags = word.to(tl.int32)
    K = tl.where((flags & 1024) != 0, M, D)
    p_w = tl.where((flags & 2048) != 0, p_decoder, p_matrices) + (word >> 24) * 16
    mask = tl.broadcast_to(o_r < (flags & 1023), [NB, R, KS])
    if D % (NB * KS) > 0 or M % (NB * KS) > 0:
        mask = mask & (o_k < ((flags >> 12) & 4095) * 16)
    return tl.load(p_w + o_r * K + o_k, mask=mask, other=0.0)
