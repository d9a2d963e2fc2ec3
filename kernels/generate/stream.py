"""The order in which a program reads its weights: one stream of tiles from the first token to the last.

Weights depend on no activation, so a program asks for tile after tile across the borders of phases and tokens, as far
ahead as its shared memory reaches; a barrier between phases stops the arithmetic and not the memory. A tile is R rows
of KC channels of this program's share of a matrix. A row's channels come first, then the other half of a pair (drive
and gate, SwiGLU's two), then the next rows, then the next matrix.

Shape letters: NB slices of KS channels make a tile's KC, one slice a warp or more; R rows; BL columns.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

# What a phase multiplies by, in the order of a layer.
CORTEX_IN = tl.constexpr(0)
MEMORY_IN = tl.constexpr(1)
OUT = tl.constexpr(2)
MLP_IN = tl.constexpr(3)
MLP_OUT = tl.constexpr(4)
DECODE = tl.constexpr(5)


@triton.jit
def by_kind(kind, narrow: tl.constexpr, memory: tl.constexpr, mlp: tl.constexpr, decode: tl.constexpr):
    """A number that differs between memory's in_proj, SwiGLU's, the decoder and all others (narrow)."""
    return tl.where(kind == MEMORY_IN, memory, tl.where(kind == MLP_IN, mlp, tl.where(kind == DECODE, decode, narrow)))


@triton.jit
def num_rows(kind, D: tl.constexpr, M: tl.constexpr, V: tl.constexpr):
    """Rows of a matrix, of one half where it is a pair."""
    return by_kind(kind, D, 4 * D, M, V)


@triton.jit
def rows_each(kind, D: tl.constexpr, M: tl.constexpr, V: tl.constexpr, P: tl.constexpr):
    """Rows of a program; the last programs may have fewer, or none."""
    return by_kind(kind, (D + P - 1) // P, (4 * D + P - 1) // P, (M + P - 1) // P, (V + P - 1) // P)


@triton.jit
def first_kind(layer, num_wernicke, num_memory, num_layers):
    """What a layer begins with; the decoder comes after the last."""
    memory = (layer >= num_wernicke) & (layer < num_wernicke + num_memory)
    return tl.where(layer == num_layers, DECODE, tl.where(memory, MEMORY_IN, CORTEX_IN))


@triton.jit
def advance(
    kind, layer, row, half, chunk, num_wernicke, num_memory, num_layers,
    D: tl.constexpr, M: tl.constexpr, V: tl.constexpr, P: tl.constexpr, R: tl.constexpr, KC: tl.constexpr,
):  # fmt: skip
    """The place of the next tile: kind and layer, the first row of the tile in the program's share, which half of a
    pair, and which chunk of channels; and how many weights the matrix that it leaves has, 0 within one."""
    paired = (kind == CORTEX_IN) | (kind == MLP_IN)
    last_chunk = chunk + 1 == tl.where(kind == MLP_OUT, (M + KC - 1) // KC, (D + KC - 1) // KC)
    last_half = last_chunk & ((half == 1) | (not paired))
    last_row = last_half & (row + R >= rows_each(kind, D, M, V, P))
    chunk = tl.where(last_chunk, 0, chunk + 1)
    half = tl.where(last_half, 0, half + last_chunk.to(tl.int32))
    row = tl.where(last_row, 0, row + last_half.to(tl.int32) * R)
    wide = tl.where(kind == MLP_IN, 2 * M, M)
    narrow = tl.where(kind == CORTEX_IN, 2 * D, tl.where(kind == MEMORY_IN, 4 * D, D))
    size = tl.where(kind == DECODE, 0, tl.where((kind == MLP_IN) | (kind == MLP_OUT), wide, narrow)) * D
    size = tl.where(last_row, size, 0)
    new_layer = tl.where(kind == DECODE, 0, layer + (kind == MLP_OUT).to(tl.int32))
    within = tl.where(kind == MLP_IN, MLP_OUT, tl.where(kind == OUT, MLP_IN, OUT))
    begins = (kind == MLP_OUT) | (kind == DECODE)
    next_kind = tl.where(begins, first_kind(new_layer, num_wernicke, num_memory, num_layers), within)
    layer = tl.where(last_row, new_layer, layer)
    kind = tl.where(last_row, next_kind, kind)
    return kind, layer, row, half, chunk, size


@triton.jit
def tiles_per_token(
    num_cortex, num_memory,
    D: tl.constexpr, M: tl.constexpr, V: tl.constexpr, P: tl.constexpr, R: tl.constexpr, KC: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (D + KC - 1) // KC
    wide_chunks: tl.constexpr = (M + KC - 1) // KC
    narrow = tl.cdiv(tl.cdiv(D, P), R)
    mlp = tl.cdiv(tl.cdiv(M, P), R) * 2 * chunks + narrow * wide_chunks
    memory = tl.cdiv(tl.cdiv(4 * D, P), R) * chunks + narrow * chunks + mlp
    cortex = 3 * narrow * chunks + mlp
    return num_cortex * cortex + num_memory * memory + tl.cdiv(tl.cdiv(V, P), R) * chunks


@triton.jit
def load_tile(
    p_matrices, p_decoder, kind, base, row, half, chunk,
    D: tl.constexpr, M: tl.constexpr, V: tl.constexpr, P: tl.constexpr, R: tl.constexpr, NB: tl.constexpr,
    KS: tl.constexpr,
):  # fmt: skip
    """A tile of weights, [NB, R, KS]."""
    o_r = tl.arange(0, R)[None, :, None]
    o_k = chunk * (NB * KS) + tl.arange(0, NB)[:, None, None] * KS + tl.arange(0, KS)[None, None, :]
    K = tl.where(kind == MLP_OUT, M, D)
    each = rows_each(kind, D, M, V, P)
    first = tl.program_id(0) * each + row
    num_left = tl.minimum(each - row, num_rows(kind, D, M, V) - first)
    pair = half * (tl.where(kind == CORTEX_IN, D, M) * D)
    p_w = tl.where(kind == DECODE, p_decoder, p_matrices + base) + (first.to(tl.int64) * K + pair)
    p_w += o_r * K + o_k
    if D % (NB * KS) == 0 and M % (NB * KS) == 0:
        mask = tl.broadcast_to(o_r < num_left, [NB, R, KS])
    else:
        mask = (o_r < num_left) & (o_k < K)
    return tl.load(p_w, mask=mask, other=0.0)
