"""What every phase of the launch is made of: weight rows times activations, norms, and prefetching.

Shape letters: BL lanes (padded), BR weight rows of a tile, NB slices of KS channels of a tile, P programs. Activations
that another program wrote are read with `.cg`, past the first-level cache, which no one keeps coherent.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl


@triton.jit
def this_program(SINGLE: tl.constexpr):
    """The program's number, of which the compiler does not know that it is the same each time: it would work out what
    all phases address before the first token, and put that aside."""
    program = tl.program_id(0)
    if not SINGLE:
        program = tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [program], dtype=tl.int32, is_pure=False, pack=1)
    return program


@triton.jit
def numbers(program, N: tl.constexpr):
    """0 to N, of which the compiler knows as little."""
    return tl.arange(0, N) + (program - tl.program_id(0))


@triton.jit
def share(program, num_rows, unit, GROUPS: tl.constexpr):
    """First row and end of a program's share of `num_rows`, in multiples of `unit`; with GROUPS each of so many groups
    of programs has all rows between its own."""
    count = tl.num_programs(0) // GROUPS
    each = (tl.cdiv(num_rows, unit) + count - 1) // count * unit
    first = program // GROUPS * each
    return first, tl.minimum(first + each, num_rows)


@triton.jit
def prefetch_rows(
    program, weights, num_rows, pair_offset, unit, K: tl.constexpr, GROUPS: tl.constexpr, LINES: tl.constexpr
):
    """Ask for the beginning of a program's share of a matrix, at most LINES cache lines of 128 bytes, to come to L2;
    with a pair offset above 0, for half as much of it and of the rows so far behind it.

    Called before a barrier for the matrix that is read after it: the memory keeps streaming while programs wait.
    """
    first, last = share(program, num_rows, unit, GROUPS)
    prefetch(weights + first.to(tl.int64) * K, (last - first) * K, pair_offset, LINES)


@triton.jit
def prefetch(weights, size, pair_offset, LINES: tl.constexpr):
    """As `prefetch_rows`, for the first of `size` elements."""
    if LINES > 0:  # noqa: SIM102, one is decided when compiled
        if size > 0:
            per_line: tl.constexpr = 1024 // weights.dtype.element_ty.primitive_bitwidth
            line = tl.arange(0, LINES)
            second = (line >= LINES // 2) & (pair_offset > 0)
            line = tl.where(second, line - LINES // 2, line)
            lines = weights + tl.minimum(line * per_line, size - 1) + tl.where(second, pair_offset, 0)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
            )


@triton.jit
def slice_shares(
    program, p_share, p_go, k, num_lanes, gated,
    K: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, GO: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr,
    BL: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """For the NB slices of KS channels from k: the shares of their groups' sums of squares, [NB, GROUP / SHARE, BL],
    and their columns' gates, [NB, BL]. A slice lies in one group."""
    o_s, o_l = k + tl.arange(0, NB) * KS, tl.arange(0, BL)
    inside = o_s < K
    PARTS: tl.constexpr = GROUP // SHARE
    o_p = (o_s // GROUP * PARTS)[:, None, None] + tl.arange(0, PARTS)[None, :, None]
    p_s = p_share + o_p * LANES + o_l[None, None, :]
    shares = tl.load(p_s, mask=inside[:, None, None], other=0.0, cache_modifier=".cg")
    go = tl.full([NB, BL], 1.0, tl.float32)
    if GO:
        p_g = p_go + numbers(program, BL)[None, :] * (K // C) + (o_s // C)[:, None]
        lanes = (o_l < num_lanes)[None, :]
        go = tl.load(p_g, mask=inside[:, None] & lanes & gated, other=1.0, cache_modifier=".cg")
    return shares, go


@triton.jit
def project(
    program, p_columns, p_w, num_rows, num_lanes, pair_offset, p_share, p_go, gated,
    K: tl.constexpr, PAIR: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, GO: tl.constexpr, C: tl.constexpr,
    EPS: tl.constexpr, LANES: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The first `num_rows` (at most BR) rows at p_w times activations `[B, K]` at p_columns, [R, BL].

    Arguments:
        p_columns: of the weights' type, so that both go from memory to tensor cores as they are.
        pair_offset, PAIR: row 2 i of what is returned is row i, and 2 i + 1 the row so many elements behind it; R is
            twice BR.
        p_share, p_go, gated, GROUP, SHARE, GO, LANES: with SHARE, activations are RMS-normalised by groups of GROUP
            channels, whose sums of squares lie `[K / SHARE, LANES]` at p_share, and with GO multiplied by their
            column's gate `[B, K / C]` where `gated`.
        NB, KS: with more than one slice, each warp multiplies a slice of KS channels, as few rows and lanes would not
            keep the warps busy; sums meet at the end. With one, all of them share the products of KS channels.
    """
    R: tl.constexpr = 2 * BR if PAIR else BR
    o_r, o_l = numbers(program, R), numbers(program, BL)
    if PAIR:
        p_r, rows = p_w + o_r // 2 * K + o_r % 2 * pair_offset, o_r // 2 < num_rows
    else:
        p_r, rows = p_w + o_r * K, o_r < num_rows
    p_l, lanes = p_columns + o_l * K, o_l < num_lanes
    shares, go = tl.zeros([NB, 1, BL], tl.float32), tl.zeros([NB, BL], tl.float32)
    if SHARE:
        shares, go = slice_shares(
            program, p_share, p_go, 0, num_lanes, gated, K, GROUP, SHARE, GO, C, LANES, BL, NB, KS
        )
    if NB > 1:
        o_k = tl.arange(0, NB)[:, None, None] * KS + tl.arange(0, KS)[None, None, :]
        acc = tl.zeros([NB, R, BL], tl.float32)
        for k in tl.range(0, K, NB * KS, num_stages=STAGES):
            inside = k + o_k < K
            w = tl.load(p_r[None, :, None] + (k + o_k), mask=rows[None, :, None] & inside, other=0.0)
            p_x = p_l[None, :, None] + (k + o_k)
            x = tl.load(p_x, mask=lanes[None, :, None] & inside, other=0.0, cache_modifier=".cg")
            if SHARE:
                product = tl.dot(w, tl.permute(x, (0, 2, 1)), input_precision="ieee")
                acc += product * (tl.rsqrt(tl.sum(shares, 1) / GROUP + EPS) * go)[:, None, :]
                # Those of the next slices are asked for a turn ahead, as weights are.
                shares, go = slice_shares(
                    program, p_share, p_go, k + NB * KS, num_lanes, gated, K, GROUP, SHARE, GO, C, LANES, BL, NB, KS
                )
            else:
                acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")
        return tl.sum(acc, 0)
    else:
        # A warpgroup's product has 64 rows: of weights, or where those are fewer of lanes.
        SWAP: tl.constexpr = R < 64 and BL >= 64
        o_k = tl.arange(0, KS)[None, :]
        acc = tl.zeros([BL, R] if SWAP else [R, BL], tl.float32)
        for k in tl.range(0, K, KS, num_stages=STAGES):
            inside = k + o_k < K
            w = tl.load(p_r[:, None] + (k + o_k), mask=rows[:, None] & inside, other=0.0)
            x = tl.load(p_l[:, None] + (k + o_k), mask=lanes[:, None] & inside, other=0.0, cache_modifier=".cg")
            a, b = (x, tl.trans(w)) if SWAP else (w, tl.trans(x))
            if SHARE:
                scale = tl.rsqrt(tl.sum(shares, 1) / GROUP + EPS) * go
                acc += tl.dot(a, b, input_precision="ieee") * (tl.trans(scale) if SWAP else scale)
                shares, go = slice_shares(
                    program, p_share, p_go, k + KS, num_lanes, gated, K, GROUP, SHARE, GO, C, LANES, BL, NB, KS
                )
            else:
                acc = tl.dot(a, b, acc, input_precision="ieee")
        return tl.trans(acc) if SWAP else acc


@triton.jit
def split_pairs(out, BR: tl.constexpr, BL: tl.constexpr):
    """The two rows of each pair that `project` multiplied, [BR, BL] each."""
    return tl.split(tl.permute(tl.reshape(out, [BR, 2, BL]), (0, 2, 1)))


@triton.jit
def load_shares(program, p_square, GROUPS: tl.constexpr, BQ: tl.constexpr, BL: tl.constexpr):
    """The programs' shares of each lane's sum of squares, [BQ, BL]; those of lanes that are padding are there too."""
    o_p, o_l = numbers(program, BQ)[:, None], tl.arange(0, BL)[None, :]
    mask = o_p < tl.num_programs(0) // GROUPS
    return tl.load(p_square + o_p * BL + o_l, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def norm_scale(shares, D: tl.constexpr, EPS: tl.constexpr):
    """The factor of RMS norm of each lane, [1, BL]. It is applied to sums, so that weights are asked for before it."""
    return tl.rsqrt(tl.sum(shares, 0) / D + EPS)[None, :]


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
