"""The phases of a token for several lanes: each is as wide as the card, and a barrier separates it from the next.

A cortex layer takes four (in, out, SwiGLU in, SwiGLU out), a memory layer five (its fast weights between in and out).
The lateral input of a spiking column needs the spikes of the token before alone, so a neuron's whole update happens
where its drive is made.

Between phases activations lie in memory as columns `[B, K]` in the weights' type, and beside them shares of the sums of
squares that their norms need: a norm is a factor of the product's sums, so nothing waits for it.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.device import (
    is_active,
    load_shares,
    norm_scale,
    normed_dot,
    numbers,
    project,
    share,
    sigmoid,
    silu,
    split_pairs,
)


@triton.jit
def lateral_input(
    program, p_spikes, p_lateral, tile, last, num_lanes,
    D: tl.constexpr, C: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """R s for neurons from `tile` on, [BR, BL], which lie in one column, from the last token's spikes `[B, D]`. EXACT
    is full float32, which costs registers; otherwise three TF32 products give nearly that."""
    # In slices, as a whole column of spikes would not fit the registers of each warp; fetched ahead only where a thread
    # copies 16 bytes, which go past the first-level cache.
    SLICE: tl.constexpr = min(C, 64)
    STAGES: tl.constexpr = 1 if BL * SLICE < 1024 else 2 if EXACT else 4
    o_l, o_c = numbers(program, BL), tl.arange(0, SLICE)
    o_r = tile + tl.arange(0, BR)
    out = tl.zeros([BR, BL], tl.float32)
    for c in tl.range(0, C, SLICE, num_stages=STAGES):
        b_w = tl.load(p_lateral + o_r[:, None] * C + c + o_c[None, :], mask=(o_r < last)[:, None], other=0.0)
        p_s = p_spikes + o_l[:, None] * D + tile // C * C + c + o_c[None, :]
        b_s = tl.load(p_s, mask=(o_l < num_lanes)[:, None] & (tile < last), other=0.0, cache_modifier=".cg")
        out = tl.dot(b_w, tl.trans(b_s), out, input_precision="ieee" if EXACT else "tf32x3")
    return out


@triton.jit
def cortex_in(
    program, lateral, p_x_columns, p_square, p_columns, p_share, p_spikes, p_state, p_matrix, p_vector, p_lengths,
    step, num_lanes,
    D: tl.constexpr, C: tl.constexpr, GRADED: tl.constexpr, THETA: tl.constexpr, BETA: tl.constexpr,
    RHO: tl.constexpr, EPS: tl.constexpr, GROUPS: tl.constexpr, BQ: tl.constexpr, BL: tl.constexpr,
    BR: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Drive and gate of each neuron, and its ALIF update. p_state is `[3, B, D]`: voltage and adaptation are written in
    place; spikes go to p_spikes `[B, D]`, since other programs still read the old ones, and s silu(z) to the columns.

    Arguments:
        lateral: the lateral input of this program's first tile, which was made before the barrier.
    """
    o_l = numbers(program, BL)
    tile, last = share(program, D, BR, 1)
    plane = num_lanes * D
    shares = load_shares(program, p_square, GROUPS, BQ, BL)
    while tile < last:
        # All that does not depend on this token is asked for before the product, not after it.
        o_r = tile + numbers(program, BR)
        rows = o_r < last
        mask = rows[:, None] & (o_l < num_lanes)[None, :]
        alpha = tl.load(p_vector + D * C + o_r, mask=rows, other=0.5)[:, None]
        bias = tl.load(p_vector + D * C + D + o_r, mask=rows, other=0.0)[:, None]
        o_n = o_l[None, :] * D + o_r[:, None]
        voltage = tl.load(p_state + o_n, mask=mask, other=0.0, cache_modifier=".cg")
        adaptation = tl.load(p_state + plane + o_n, mask=mask, other=0.0, cache_modifier=".cg")
        spikes = tl.load(p_state + 2 * plane + o_n, mask=mask, other=0.0, cache_modifier=".cg")
        active = is_active(p_lengths, o_l, o_l < num_lanes, step)[None, :]
        out = project(
            program, p_x_columns, p_matrix + tile * D, last - tile, num_lanes, D * D, p_share, p_share, False,
            D, True, 0, 0, False, C, EPS, BL, BL, BR, NB, KS, STAGES,
        )  # fmt: skip
        scale = norm_scale(shares, D, EPS)
        drive, gate = split_pairs(out, BR, BL)
        drive, gate = drive * scale, gate * scale

        a = spikes + RHO * (adaptation - spikes)
        v = alpha * (voltage - THETA * spikes) + tl.sqrt(1.0 - alpha) * (drive + bias) + (1.0 - alpha) * lateral
        u = v - BETA * a - THETA
        s = tl.minimum(tl.maximum(u, 0.0), 4.0) if GRADED else tl.where(u > 0.0, 1.0, 0.0)
        s = tl.where(active, s, spikes)
        tl.store(p_state + o_n, v, mask=mask & active)
        tl.store(p_state + plane + o_n, a, mask=mask & active)
        tl.store(p_spikes + o_n, s, mask=mask)
        tl.store(p_columns + o_n, (s * silu(gate)).to(p_columns.dtype.element_ty), mask=mask)
        tl.store(p_share + tile // BR * BL + o_l, tl.sum(tl.where(mask, s * s, 0.0), 0))
        tile += BR
        if tile < last:
            lateral = lateral_input(program, p_state + 2 * plane, p_vector, tile, last, num_lanes, D, C, BL, BR, EXACT)


@triton.jit
def go_gates(
    program, p_x, p_go, p_vector, num_lanes, D: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr
):
    """The basal ganglia's gates `[B, K]`; the last programs begin, as they have the fewest rows of the phase. Four
    columns of a lane at once: with many lanes a program has several to do, and each waits for what it reads."""
    BLOCKS: tl.constexpr = (K + 3) // 4
    o_d = tl.arange(0, BD)
    inside = (o_d < D)[None, :]
    unit = tl.num_programs(0) - 1 - program
    while unit < num_lanes * BLOCKS:
        lane, o_c = unit // BLOCKS, unit % BLOCKS * 4 + tl.arange(0, 4)
        columns = o_c < K
        w = tl.load(p_vector + o_c[:, None] * D + o_d[None, :], mask=inside & columns[:, None], other=0.0)
        x = tl.load(p_x + lane * D + o_d[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        bias = tl.load(p_vector + K * D + o_c, mask=columns, other=0.0)
        logit = tl.sum(w * x, 1) * tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
        tl.store(p_go + lane * K + o_c, sigmoid(logit + bias), mask=columns)
        unit += tl.num_programs(0)


@triton.jit
def add_rows(
    program, p_columns, p_share, p_go, gated, p_spikes, p_state_spikes, p_x, p_x_columns, p_square, p_matrix,
    num_lanes,
    D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, GO: tl.constexpr,
    SPIKES: tl.constexpr, EPS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, BR: tl.constexpr,
    NB: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x `[B, D]` += W in, in `[B, K]` as columns, normalised and gated as `project` says; x also as columns, and this
    program's share of its squares. Each of GROUPS groups of programs has all rows and its own lanes: with many lanes,
    reading activations costs more than reading weights twice.

    Arguments:
        SPIKES: whether new spikes `[B, D]` become the state's here, now that nobody reads the old ones.
    """
    BL: tl.constexpr = LANES // GROUPS
    first_lane = program % GROUPS * BL
    left = num_lanes - first_lane
    o_l = numbers(program, BL)
    tile, last = share(program, D, 1, GROUPS)
    square = tl.zeros([BL], tl.float32)
    while tile < last:
        o_r = tile + numbers(program, BR)
        mask = (o_r < last)[:, None] & (o_l < left)[None, :]
        o_n = (first_lane + o_l)[None, :] * D + o_r[:, None]
        x = tl.load(p_x + o_n, mask=mask, other=0.0, cache_modifier=".cg")
        if SPIKES:
            new_spikes = tl.load(p_spikes + o_n, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(p_state_spikes + o_n, new_spikes, mask=mask)
        x += project(
            program, p_columns + first_lane * K, p_matrix + tile * K, last - tile, left, 0, p_share + first_lane,
            p_go + first_lane * (D // C), gated,
            K, False, GROUP, SHARE, GO, C, EPS, LANES, BL, BR, NB, KS, STAGES,
        )  # fmt: skip
        tl.store(p_x + o_n, x, mask=mask)
        tl.store(p_x_columns + o_n, x.to(p_x_columns.dtype.element_ty), mask=mask)
        square += tl.sum(tl.where(mask, x * x, 0.0), 0)
        tile += BR
    index = program // GROUPS
    tl.store(p_square + index * LANES + first_lane + o_l, square, mask=index < tl.num_programs(0) // GROUPS)


@triton.jit
def memory_in(
    program, p_x_columns, p_square, p_inner, p_matrix, num_lanes,
    D: tl.constexpr, EPS: tl.constexpr, GROUPS: tl.constexpr, BQ: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr,
    NB: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """inner `[B, 4D]` (query, key, value, gate) = W rms(x)."""
    o_l = numbers(program, BL)
    tile, last = share(program, 4 * D, 1, 1)
    shares = load_shares(program, p_square, GROUPS, BQ, BL)
    while tile < last:
        o_r = tile + numbers(program, BR)
        out = project(
            program, p_x_columns, p_matrix + tile * D, last - tile, num_lanes, 0, p_square, p_square, False,
            D, False, 0, 0, False, D, EPS, BL, BL, BR, NB, KS, STAGES,
        )  # fmt: skip
        mask = (o_r < last)[:, None] & (o_l < num_lanes)[None, :]
        tl.store(p_inner + o_l[None, :] * (4 * D) + o_r[:, None], out * norm_scale(shares, D, EPS), mask=mask)
        tile += BR


@triton.jit
def swiglu_in(
    program, p_x_columns, p_square, p_hidden, p_matrix, num_lanes,
    D: tl.constexpr, M: tl.constexpr, EPS: tl.constexpr, GROUPS: tl.constexpr, BQ: tl.constexpr, BL: tl.constexpr,
    BR: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """hidden `[B, M]`, as columns, = silu(g) u with [g, u] = W_in rms(x)."""
    o_l = numbers(program, BL)
    tile, last = share(program, M, 1, 1)
    shares = load_shares(program, p_square, GROUPS, BQ, BL)
    while tile < last:
        out = project(
            program, p_x_columns, p_matrix + tile * D, last - tile, num_lanes, M * D, p_square, p_square, False,
            D, True, 0, 0, False, D, EPS, BL, BL, BR, NB, KS, STAGES,
        )  # fmt: skip
        scale = norm_scale(shares, D, EPS)
        gate, value = split_pairs(out, BR, BL)
        hidden = silu(gate * scale) * (value * scale)
        o_r = tile + numbers(program, BR)
        mask = (o_r < last)[:, None] & (o_l < num_lanes)[None, :]
        tl.store(p_hidden + o_l[None, :] * M + o_r[:, None], hidden.to(p_hidden.dtype.element_ty), mask=mask)
        tile += BR


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
def memory_inputs(unit, p_inner, D: tl.constexpr, N: tl.constexpr, CU: tl.constexpr):
    """A unit's query and key, [N], and value and gate, [CU]."""
    H: tl.constexpr = D // N
    parts: tl.constexpr = N // CU
    o_n, o_v = tl.arange(0, N), unit % parts * CU + tl.arange(0, CU)
    p_in = p_inner + unit // (parts * H) * 4 * D + unit // parts % H * N
    q = tl.load(p_in + o_n, cache_modifier=".cg")
    k = tl.load(p_in + D + o_n, cache_modifier=".cg")
    v = tl.load(p_in + 2 * D + o_v, cache_modifier=".cg")
    return q, k, v, tl.load(p_in + 3 * D + o_v, cache_modifier=".cg")


@triton.jit
def memory_unit(
    unit, weight, forget, write, q, k, v, gate, p_columns, p_share, p_state, p_lengths, step,
    D: tl.constexpr, N: tl.constexpr, DELTA: tl.constexpr, EPS: tl.constexpr, CU: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Write and read a unit, CU value channels of one lane's head: what is read times silu(gate), as columns `[B, D]`,
    and the share of the squares of what is read, `[D / CU, BL]`."""
    H: tl.constexpr = D // N
    parts: tl.constexpr = N // CU
    head, lane = unit // parts % H, unit // (parts * H)
    o_n, o_v = tl.arange(0, N), unit % parts * CU + tl.arange(0, CU)
    q, k = silu(q), silu(k)
    active = is_active(p_lengths, lane, True, step)
    q *= tl.rsqrt(tl.sum(q * q, 0) + EPS)
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    weight *= forget
    if DELTA:
        v = write * (v - tl.sum(weight * k[:, None], 0))
    weight += k[:, None] * v[None, :]
    p_s = p_state + (lane * H + head).to(tl.int64) * N * N + o_n[:, None] * N + o_v[None, :]
    tl.store(p_s, weight, mask=(o_n < N)[:, None] & active)
    read = tl.sum(weight * q[:, None], 0)
    y = read * silu(gate)
    tl.store(p_columns + lane * D + head * N + o_v, y.to(p_columns.dtype.element_ty))
    tl.store(p_share + unit % (parts * H) * BL + lane, tl.sum(read * read, 0))
