"""What surrounds the products of the stream: how a phase gathers its activations, and what becomes of its sums.

Activations lie in memory as columns `[BL, K]` in the weights' type: with SPLIT two a lane, the value rounded and what
the rounding lost, so that a lane's activations count in nearly float32; otherwise one a lane. Sums are float32.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.device import is_active, normed_dot, sigmoid, silu


@triton.jit
def arrive(p_counter, SINGLE: tl.constexpr):
    """Say that what this program stored is there. Skipped for a single program (the interpreter runs them in turn)."""
    if not SINGLE:
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .u32 t;
            bar.sync 0;
            mov.u32 t, %tid.x;
            setp.eq.u32 p, t, 0;
            @p red.release.gpu.global.add.u32 [$1], 1;
            mov.u32 $0, 0; }""",
            "=r,l", [p_counter], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def wait(p_counter, target, SINGLE: tl.constexpr):
    """Wait for `target` arrivals since the launch; what was stored before them is then visible to loads with `.cg`.

    One warp polls, relaxed: an acquire would throw away the first-level cache at each poll, and what other programs
    write is never read from it."""
    if not SINGLE:
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .u32 t;
            mov.u32 t, %tid.x;
            setp.ge.u32 p, t, 32;
            @p bra DONE;
            POLL: ld.relaxed.gpu.global.u32 t, [$1];
            sub.u32 t, t, $2;
            setp.lt.s32 p, t, 0;
            @p bra POLL;
            DONE: bar.sync 0;
            mov.u32 $0, 0; }""",
            "=r,l,r", [p_counter, target], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def block_barrier(SINGLE: tl.constexpr):
    """All threads of this program are here. Not `tl.debug_barrier`, beside which no loop is pipelined."""
    if not SINGLE:
        tl.inline_asm_elementwise(
            "bar.sync 0; mov.u32 $0, 0;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def column_parts(BL: tl.constexpr, LN: tl.constexpr, SPLIT: tl.constexpr):
    """What each column of a product is, [BL] each: the lane, the chunk of channels, and with SPLIT whether it is the
    remainder (1) or the rounded value (0)."""
    parts: tl.constexpr = 2 if SPLIT else 1
    o_c = tl.arange(0, BL)
    return o_c // (BL // LN), o_c % (BL // LN) // parts, o_c % parts


@triton.jit
def load_columns(
    p_columns, K, num_lanes,
    NB: tl.constexpr, KS: tl.constexpr, BL: tl.constexpr, LN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """All activations of a phase, [NB, KS, BL]: each chunk of channels is a column, as a tile of weights lies in one
    chunk and a product with the others is not looked at."""
    lane, chunk, part = column_parts(BL, LN, SPLIT)
    o_k = (tl.arange(0, NB)[:, None, None] * KS + tl.arange(0, KS)[None, :, None]) + (chunk * (NB * KS))[None, None, :]
    row = lane * (2 if SPLIT else 1) + part
    mask = (o_k < K) & (lane < num_lanes)[None, None, :]
    return tl.load(p_columns + row[None, None, :] * K + o_k, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def store_columns(p_columns, value, o_r, rows, num_lanes, K: tl.constexpr, LN: tl.constexpr, SPLIT: tl.constexpr):
    """Channels o_r of all lanes, value [R, LN], as columns."""
    o_l = tl.arange(0, LN)[None, :]
    mask = rows[:, None] & (o_l < num_lanes)
    rounded = value.to(p_columns.dtype.element_ty)
    if SPLIT:
        p = p_columns + 2 * o_l * K + o_r[:, None]
        tl.store(p, rounded, mask=mask)
        tl.store(p + K, (value - rounded.to(tl.float32)).to(p_columns.dtype.element_ty), mask=mask)
    else:
        tl.store(p_columns + o_l * K + o_r[:, None], rounded, mask=mask)


@triton.jit
def load_squares(p_square, num_lanes, needed, BP: tl.constexpr, LN: tl.constexpr):
    """Each program's share of the sum of squares, `[P, LN]`."""
    o_p, o_l = tl.arange(0, BP)[:, None], tl.arange(0, LN)[None, :]
    mask = (o_p < tl.num_programs(0)) & (o_l < num_lanes) & needed
    return tl.load(p_square + o_p * LN + o_l, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def norm_scale(squares, needed, D: tl.constexpr, EPS: tl.constexpr):
    """The factor of RMS norm of each lane, [LN]."""
    return tl.where(needed, tl.rsqrt(tl.sum(squares, 0) / D + EPS), 1.0)


@triton.jit
def load_groups(
    p_group, num_lanes, D: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr, BL: tl.constexpr, LN: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The values `[B, D]` that are normalised by group, for each column of a product, [NB, KS, BL]."""
    lane, chunk, _ = column_parts(BL, LN, SPLIT)
    o_s = (tl.arange(0, NB)[:, None] + (chunk * NB)[None, :]) * KS
    o_k = o_s[:, None, :] + tl.arange(0, KS)[None, :, None]
    mask = (o_k < D) & (lane < num_lanes)[None, None, :]
    return tl.load(p_group + lane[None, None, :] * D + o_k, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def group_scale(
    value, p_go, gated, num_lanes, GROUP: tl.constexpr, D: tl.constexpr, C: tl.constexpr, GO: tl.constexpr,
    EPS: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr, BL: tl.constexpr, LN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The factor by which each slice counts, [NB, BL]: the RMS norm of its group of channels, and its column's gate
    where `gated`. A slice lies in one group."""
    lane, chunk, _ = column_parts(BL, LN, SPLIT)
    o_s = (tl.arange(0, NB)[:, None] + (chunk * NB)[None, :]) * KS
    lanes = (lane < num_lanes)[None, :]
    square = tl.sum(value * value, 1)
    SPAN: tl.constexpr = GROUP // KS
    if SPAN > 1:
        square = tl.sum(tl.reshape(square, [NB // SPAN, SPAN, BL]), 1)
        square = tl.reshape(tl.broadcast_to(square[:, None, :], [NB // SPAN, SPAN, BL]), [NB, BL])
    scale = tl.rsqrt(square / GROUP + EPS)
    if GO:
        p_g = p_go + lane[None, :] * (D // C) + o_s // C
        scale *= tl.load(p_g, mask=lanes & (o_s < D) & gated, other=1.0, cache_modifier=".cg")
    return scale


@triton.jit
def lateral_sums(
    p_spikes, p_lateral, o_r, rows, num_lanes, D: tl.constexpr, C: tl.constexpr, LN: tl.constexpr,
):  # fmt: skip
    """R s for neurons o_r, [R, LN], from the last token's spikes `[B, D]`, in float32."""
    o_c = tl.arange(0, C)
    b_w = tl.load(p_lateral + o_r[:, None] * C + o_c[None, :], mask=rows[:, None], other=0.0)
    o_l = tl.arange(0, LN)
    out = tl.zeros([o_r.shape[0], LN], tl.float32)
    lane = 0
    while lane < num_lanes:
        p_s = p_spikes + lane * D + (o_r // C * C)[:, None] + o_c[None, :]
        b_s = tl.load(p_s, mask=rows[:, None], other=0.0, cache_modifier=".cg")
        out += tl.where(o_l[None, :] == lane, tl.sum(b_w * b_s, 1)[:, None], 0.0)
        lane += 1
    return out


@triton.jit
def spike_update(
    drive, o_r, rows, p_state, p_vector, p_group, p_lengths, step, num_lanes,
    D: tl.constexpr, C: tl.constexpr, GRADED: tl.constexpr, THETA: tl.constexpr, BETA: tl.constexpr,
    RHO: tl.constexpr, LN: tl.constexpr,
):  # fmt: skip
    """The ALIF update of neurons o_r, whose spikes [R, LN] it returns. p_state is `[3, B, D]`: voltage and adaptation
    are written in place; spikes go to p_group `[B, D]`, since other programs still read the old ones."""
    o_l = tl.arange(0, LN)
    plane = num_lanes * D
    alpha = tl.load(p_vector + D * C + o_r, mask=rows, other=0.5)[:, None]
    bias = tl.load(p_vector + D * C + D + o_r, mask=rows, other=0.0)[:, None]
    o_n = o_l[None, :] * D + o_r[:, None]
    mask = rows[:, None] & (o_l < num_lanes)[None, :]
    voltage = tl.load(p_state + o_n, mask=mask, other=0.0, cache_modifier=".cg")
    adaptation = tl.load(p_state + plane + o_n, mask=mask, other=0.0, cache_modifier=".cg")
    spikes = tl.load(p_state + 2 * plane + o_n, mask=mask, other=0.0, cache_modifier=".cg")
    active = is_active(p_lengths, o_l, o_l < num_lanes, step)[None, :]
    lateral = lateral_sums(p_state + 2 * plane, p_vector, o_r, rows, num_lanes, D, C, LN)
    a = spikes + RHO * (adaptation - spikes)
    v = alpha * (voltage - THETA * spikes) + tl.sqrt(1.0 - alpha) * (drive + bias) + (1.0 - alpha) * lateral
    u = v - BETA * a - THETA
    s = tl.minimum(tl.maximum(u, 0.0), 4.0) if GRADED else tl.where(u > 0.0, 1.0, 0.0)
    s = tl.where(active, s, spikes)
    tl.store(p_state + o_n, v, mask=mask & active)
    tl.store(p_state + plane + o_n, a, mask=mask & active)
    tl.store(p_group + o_n, s, mask=mask)
    return s


@triton.jit
def fetch_memory(
    unit, p_x, p_state, p_vector, num_units,
    D: tl.constexpr, N: tl.constexpr, DELTA: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr, CU: tl.constexpr,
):  # fmt: skip
    """A unit is CU value channels of one lane's head: its fast weights [N, CU], forget gate and (delta rule) write
    gate, which do not wait for the projections. The gates' projections stay in float32, as their rounding would be felt
    over thousands of tokens."""
    H: tl.constexpr = D // N
    parts: tl.constexpr = N // CU
    exists = unit < num_units
    unit = tl.minimum(unit, num_units - 1)
    head, lane = unit // parts % H, unit // (parts * H)
    o_n, o_v = tl.arange(0, N)[:, None], unit % parts * CU + tl.arange(0, CU)[None, :]
    p_s = p_state + (lane * H + head).to(tl.int64) * N * N + o_n * N + o_v
    weight = tl.load(p_s, mask=(o_n < N) & exists, other=0.0, cache_modifier=".cg")
    forget = normed_dot(p_x + lane * D, p_vector + head * D, D, EPS, BD) + tl.load(p_vector + H * D + head)
    write = forget
    if DELTA:
        p_write = p_vector + H * (D + 1)
        write = normed_dot(p_x + lane * D, p_write + head * D, D, EPS, BD) + tl.load(p_write + H * D + head)
    return weight, sigmoid(forget), sigmoid(write)


@triton.jit
def memory_unit(
    unit, weight, forget, write, p_inner, p_group, p_columns, p_state, p_lengths, step,
    D: tl.constexpr, N: tl.constexpr, DELTA: tl.constexpr, EPS: tl.constexpr, CU: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write and read a unit: inner `[B, 4D]` (query, key, value, gate) to what is read, `[B, D]` at p_group, and that
    times silu(gate) as columns."""
    H: tl.constexpr = D // N
    parts: tl.constexpr = N // CU
    head, lane = unit // parts % H, unit // (parts * H)
    o_n, o_v = tl.arange(0, N), unit % parts * CU + tl.arange(0, CU)
    p_in = p_inner + lane * 4 * D + head * N
    q = silu(tl.load(p_in + o_n, cache_modifier=".cg"))
    k = silu(tl.load(p_in + D + o_n, cache_modifier=".cg"))
    v = tl.load(p_in + 2 * D + o_v, cache_modifier=".cg")
    gate = tl.load(p_in + 3 * D + o_v, cache_modifier=".cg")
    active = is_active(p_lengths, lane, True, step)
    q *= tl.rsqrt(tl.sum(q * q, 0) + EPS)
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    weight *= forget
    if DELTA:
        v = write * (v - tl.sum(weight * k[:, None], 0))
    weight += k[:, None] * v[None, :]
    read = tl.sum(weight * q[:, None], 0)
    o_d = head * N + o_v
    tl.store(p_group + lane * D + o_d, read)
    y = read * silu(gate)
    rounded = y.to(p_columns.dtype.element_ty)
    if SPLIT:
        tl.store(p_columns + 2 * lane * D + o_d, rounded)
        tl.store(p_columns + (2 * lane + 1) * D + o_d, (y - rounded.to(tl.float32)).to(p_columns.dtype.element_ty))
    else:
        tl.store(p_columns + lane * D + o_d, rounded)
    p_s = p_state + (lane * H + head).to(tl.int64) * N * N + o_n[:, None] * N + o_v[None, :]
    tl.store(p_s, weight, mask=(o_n < N)[:, None] & active)
