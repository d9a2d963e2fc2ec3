"""What every phase of the launch is made of: the barrier, weight rows times activations, and prefetching.

Shape letters: BL lanes (padded), BR weight rows of a tile, BK channels of a tile, P programs. Activations that another
program wrote are read with `.cg`, past the first-level cache, which no one keeps coherent.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl


@triton.jit
def grid_barrier(counter, SINGLE: tl.constexpr):
    """Wait until all P programs are here; what they stored before is then visible.

    The counter only ever grows: the arrival's own number tells which round it belongs to, so nothing is reset and a
    fast program cannot be taken for a slow one. Skipped for a single program (the interpreter runs them in turn).
    """
    tl.debug_barrier()
    if not SINGLE:
        num_programs = tl.num_programs(0).to(tl.int64)
        arrived = tl.atomic_add(counter, 1, sem="release", scope="gpu").to(tl.int64)
        target = (arrived // num_programs + 1) * num_programs
        arrived += 1
        while arrived < target:
            arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu").to(tl.int64)
        tl.debug_barrier()


@triton.jit
def share(num_rows, UNIT: tl.constexpr):
    """First row and end of this program's share of `num_rows`, in multiples of UNIT."""
    num_programs = tl.num_programs(0)
    each = (tl.cdiv(num_rows, UNIT) + num_programs - 1) // num_programs * UNIT
    first = tl.program_id(0) * each
    return first, tl.minimum(first + each, num_rows)


@triton.jit
def prefetch_rows(weights, num_rows, pair_offset, K: tl.constexpr, UNIT: tl.constexpr, LINES: tl.constexpr):
    """Ask for the beginning of this program's share of a matrix, at most LINES cache lines of 128 bytes, to come to L2;
    with a pair offset above 0, for half as much of it and of the rows so far behind it.

    Called before a barrier for the matrix that is read after it: the memory keeps streaming while programs wait.
    """
    if LINES > 0:
        first, last = share(num_rows, UNIT)
        if first < last:
            per_line: tl.constexpr = 1024 // weights.dtype.element_ty.primitive_bitwidth
            line = tl.arange(0, LINES)
            second = (line >= LINES // 2) & (pair_offset > 0)
            line = tl.where(second, line - LINES // 2, line)
            offset = tl.minimum(line * per_line, (last - first) * K - 1) + tl.where(second, pair_offset, 0)
            lines = weights + first.to(tl.int64) * K + offset
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
            )


@triton.jit
def accumulate(acc, x, w, DOT: tl.constexpr):
    """Add activations x times w [BR, BK]: with DOT, x is [BL, BK] and the sum [BL, BR], on tensor cores in
    bfloat16; else x is one lane's [BK] and the sum stays spread over its products [BR, BK] until `finish`."""
    if DOT:
        return tl.dot(x.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
    else:
        return acc + w.to(tl.float32) * x[None, :]


@triton.jit
def finish(acc, DOT: tl.constexpr):
    """What `accumulate` gathered, as [BL, BR]."""
    if DOT:
        return acc
    else:
        return tl.sum(acc, 1)[None, :]


@triton.jit
def empty_sums(BL: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr):
    if DOT:
        return tl.zeros([BL, BR], tl.float32)
    else:
        return tl.zeros([BR, BK], tl.float32)


@triton.jit
def load_activations(p_x, k, num_lanes, K: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr):
    """Channels k to k + BK of activations `[B, K]` as `accumulate` takes them. One lane's are a vector, not a matrix of
    one row, or the compiler would lay the weights out to suit them."""
    o_l, o_k = tl.arange(0, BL), k + tl.arange(0, BK)
    if DOT:
        mask = (o_l < num_lanes)[:, None] & (o_k < K)[None, :]
        return tl.load(p_x + o_l[:, None] * K + o_k[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    else:
        return tl.load(p_x + o_k, mask=o_k < K, other=0.0, cache_modifier=".cg")


@triton.jit
def project(
    p_x,
    p_w,
    num_rows,
    num_lanes,
    pair_offset,
    K: tl.constexpr,
    NORM: tl.constexpr,
    PAIR: tl.constexpr,
    EPS: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The first `num_rows` (at most BR) rows at p_w times activations `[B, K]` at p_x.

    Arguments:
        NORM: whether activations are RMS-normalised. That is a factor a lane, applied to the sums, so that weights are
            requested without waiting for it.
        PAIR: whether the rows `pair_offset` elements further on are multiplied too.

    Returns:
        Two [BL, BR]; the second is zero without PAIR.
    """
    o_r, o_k = tl.arange(0, BR), tl.arange(0, BK)
    p_w = p_w + o_r[:, None] * K + o_k[None, :]
    rows = (o_r < num_rows)[:, None]
    acc, acc_pair = empty_sums(BL, BR, BK, DOT), empty_sums(BL, BR, BK, DOT)
    square = tl.zeros([BL, BK] if DOT else [BK], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        inside = (k + o_k < K)[None, :]
        b_w = tl.load(p_w + k, mask=rows & inside, other=0.0)
        b_x = load_activations(p_x, k, num_lanes, K, BL, BK, DOT)
        if NORM:
            square += b_x * b_x
        acc = accumulate(acc, b_x, b_w, DOT)
        if PAIR:
            b_pair = tl.load(p_w + pair_offset + k, mask=rows & inside, other=0.0)
            acc_pair = accumulate(acc_pair, b_x, b_pair, DOT)
    out, out_pair = finish(acc, DOT), finish(acc_pair, DOT)
    if NORM:
        scale = tl.rsqrt(tl.sum(square, 1 if DOT else 0) / K + EPS)
        if DOT:
            scale = scale[:, None]
        out, out_pair = out * scale, out_pair * scale
    return out, out_pair


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def is_active(p_lengths, lanes, mask, step):
    """Whether a lane had not met a stop token before this step; its length is 0 until it does."""
    length = tl.load(p_lengths + lanes, mask=mask, other=0, cache_modifier=".cg")
    return (length == 0) | (length > step)


@triton.jit
def normed_dot(p_x, p_w, D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """rms(x) . w for one lane's x `[D]` and one float32 row w `[D]`."""
    o_k = tl.arange(0, BLOCK)
    w = tl.load(p_w + o_k, mask=o_k < D, other=0.0)
    x = tl.load(p_x + o_k, mask=o_k < D, other=0.0, cache_modifier=".cg")
    return tl.sum(x * w, 0) * tl.rsqrt(tl.sum(x * x, 0) / D + EPS)
