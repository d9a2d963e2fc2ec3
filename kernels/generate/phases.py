"""The phases of a token: each is as wide as the card, and a grid barrier separates it from the next.

A cortex layer takes four (in, out, SwiGLU in, SwiGLU out), a memory layer five (its fast weights between in and out).
The lateral input of a spiking column needs the spikes of the token before alone, so a neuron's whole update happens
where its drive is made.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.device import (
    accumulate,
    empty_sums,
    finish,
    is_active,
    load_activations,
    normed_dot,
    project,
    share,
    sigmoid,
    silu,
)


@triton.jit
def lateral_input(
    p_spikes,
    p_lateral,
    first,
    o_r,
    rows,
    num_lanes,
    D: tl.constexpr,
    C: tl.constexpr,
    BL: tl.constexpr,
    DOT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """R s for the neurons o_r of a tile, [BL, BR], from the last token's spikes `[B, D]`. With DOT the tile lies in one
    column (the caller sees to it); a single lane gathers, so that tiles need not. EXACT is full float32, which costs
    registers; otherwise three TF32 products give nearly that."""
    o_l, o_c = tl.arange(0, BL), tl.arange(0, C)
    b_w = tl.load(p_lateral + o_r[:, None] * C + o_c[None, :], mask=rows[:, None], other=0.0)
    if DOT:
        p_s = p_spikes + o_l[:, None] * D + first // C * C + o_c[None, :]
        b_s = tl.load(p_s, mask=(o_l < num_lanes)[:, None], other=0.0, cache_modifier=".cg")
        return tl.dot(b_s, tl.trans(b_w), input_precision="ieee" if EXACT else "tf32x3")
    else:
        p_s = p_spikes + (o_r // C * C)[:, None] + o_c[None, :]
        b_s = tl.load(p_s, mask=rows[:, None], other=0.0, cache_modifier=".cg")
        return tl.sum(b_w * b_s, 1)[None, :]


@triton.jit
def cortex_in(
    p_x,
    p_spikes,
    p_gates,
    p_state,
    p_matrix,
    p_vector,
    p_lengths,
    step,
    num_lanes,
    D: tl.constexpr,
    C: tl.constexpr,
    GRADED: tl.constexpr,
    THETA: tl.constexpr,
    BETA: tl.constexpr,
    RHO: tl.constexpr,
    EPS: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Drive and gate of each neuron, and its ALIF update. p_state is `[3, B, D]`: voltage and adaptation are written in
    place; spikes go to p_spikes `[B, D]`, since other programs still read the old ones."""
    o_l = tl.arange(0, BL)
    tile, last = share(D, BR if DOT else 1)
    plane = num_lanes * D
    EXACT: tl.constexpr = p_matrix.dtype.element_ty == tl.float32
    while tile < last:
        # All that does not depend on this token is asked for before the product, not after it.
        o_r = tile + tl.arange(0, BR)
        rows = o_r < last
        mask = (o_l < num_lanes)[:, None] & rows[None, :]
        alpha = tl.load(p_vector + D * C + o_r, mask=rows, other=0.5)[None, :]
        bias = tl.load(p_vector + D * C + D + o_r, mask=rows, other=0.0)[None, :]
        o_n = o_l[:, None] * D + o_r[None, :]
        voltage = tl.load(p_state + o_n, mask=mask, other=0.0, cache_modifier=".cg")
        adaptation = tl.load(p_state + plane + o_n, mask=mask, other=0.0, cache_modifier=".cg")
        spikes = tl.load(p_state + 2 * plane + o_n, mask=mask, other=0.0, cache_modifier=".cg")
        active = is_active(p_lengths, o_l, o_l < num_lanes, step)[:, None]
        lateral = tl.zeros([BL, BR], tl.float32)
        if not DOT:
            lateral = lateral_input(p_state + 2 * plane, p_vector, tile, o_r, rows, num_lanes, D, C, BL, DOT, EXACT)
        drive, gate = project(
            p_x, p_matrix + tile * D, last - tile, num_lanes, D * D, D, True, True, EPS, BL, BR, BK, DOT, STAGES
        )
        if DOT:
            # With many lanes the registers of the product leave no room for it before.
            lateral = lateral_input(p_state + 2 * plane, p_vector, tile, o_r, rows, num_lanes, D, C, BL, DOT, EXACT)

        a = spikes + RHO * (adaptation - spikes)
        v = alpha * (voltage - THETA * spikes) + tl.sqrt(1.0 - alpha) * (drive + bias) + (1.0 - alpha) * lateral
        u = v - BETA * a - THETA
        s = tl.minimum(tl.maximum(u, 0.0), 4.0) if GRADED else tl.where(u > 0.0, 1.0, 0.0)
        tl.store(p_state + o_n, v, mask=mask & active)
        tl.store(p_state + plane + o_n, a, mask=mask & active)
        tl.store(p_spikes + o_n, tl.where(active, s, spikes), mask=mask)
        tl.store(p_gates + o_n, gate, mask=mask)
        tile += BR


@triton.jit
def go_gates(p_x, p_go, p_vector, num_lanes, D: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr):
    """The basal ganglia's gates `[B, K]`; the last programs begin, as they have the fewest rows of the phase."""
    unit = tl.num_programs(0) - 1 - tl.program_id(0)
    while unit < num_lanes * K:
        column = unit % K
        logit = normed_dot(p_x + unit // K * D, p_vector + column * D, D, EPS, BD)
        tl.store(p_go + unit, sigmoid(logit + tl.load(p_vector + K * D + column)))
        unit += tl.num_programs(0)


@triton.jit
def cortex_out(
    p_x,
    p_spikes,
    p_gates,
    p_go,
    p_state,
    p_matrix,
    num_lanes,
    gated,
    D: tl.constexpr,
    C: tl.constexpr,
    GO: tl.constexpr,
    EPS: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x += W_out (rms_per_column(s) * silu(z) * go); and the new spikes become the state's.

    Arguments:
        GO: whether the brain has gates. gated: whether this layer obeys them.
    """
    o_l, o_k = tl.arange(0, BL), tl.arange(0, BK)
    groups: tl.constexpr = BK // C
    lanes = (o_l < num_lanes)[:, None]
    tile, last = share(D, 1)
    while tile < last:
        o_r = tile + tl.arange(0, BR)
        rows = o_r < last
        mask = lanes & rows[None, :]
        o_n = o_l[:, None] * D + o_r[None, :]
        new_spikes = tl.load(p_spikes + o_n, mask=mask, other=0.0, cache_modifier=".cg")
        x = tl.load(p_x + o_n, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(p_state + 2 * num_lanes * D + o_n, new_spikes, mask=mask)
        acc = empty_sums(BL, BR, BK, DOT)
        for k in tl.range(0, D, BK, num_stages=STAGES):
            inside = (k + o_k < D)[None, :]
            b_w = tl.load(p_matrix + o_r[:, None] * D + (k + o_k)[None, :], mask=rows[:, None] & inside, other=0.0)
            s = load_activations(p_spikes, k, num_lanes, D, BL, BK, DOT)
            z = load_activations(p_gates, k, num_lanes, D, BL, BK, DOT)
            grouped = tl.reshape(s, [BL, groups, C])
            scale = tl.rsqrt(tl.sum(grouped * grouped, 2) / C + EPS)
            if GO:
                o_g = k // C + tl.arange(0, groups)
                p_g = p_go + o_l[:, None] * (D // C) + o_g[None, :]
                scale *= tl.load(p_g, mask=lanes & (o_g < D // C)[None, :] & gated, other=1.0, cache_modifier=".cg")
            y = tl.reshape(grouped * scale[:, :, None], [BL, BK] if DOT else [BK]) * silu(z)
            acc = accumulate(acc, y, b_w, DOT)
        tl.store(p_x + o_n, x + finish(acc, DOT), mask=mask)
        tile += BR


@triton.jit
def plain_rows(
    p_in,
    p_out,
    p_matrix,
    num_rows,
    num_lanes,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    EPS: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out `[B, num_rows]` = W in, in `[B, K]` RMS-normalised with NORM; added to what is there with ADD."""
    o_l = tl.arange(0, BL)
    tile, last = share(num_rows, 1)
    while tile < last:
        o_r = tile + tl.arange(0, BR)
        mask = (o_l < num_lanes)[:, None] & (o_r < last)[None, :]
        p_n = p_out + o_l[:, None] * num_rows + o_r[None, :]
        before = tl.zeros([BL, BR], tl.float32)
        if ADD:
            before = tl.load(p_n, mask=mask, other=0.0, cache_modifier=".cg")
        out, _ = project(
            p_in, p_matrix + tile * K, last - tile, num_lanes, 0, K, NORM, False, EPS, BL, BR, BK, DOT, STAGES
        )
        tl.store(p_n, before + out, mask=mask)
        tile += BR


@triton.jit
def swiglu_in(
    p_x,
    p_hidden,
    p_matrix,
    num_lanes,
    D: tl.constexpr,
    M: tl.constexpr,
    EPS: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """hidden `[B, M]` = silu(g) u with [g, u] = W_in rms(x)."""
    o_l = tl.arange(0, BL)
    tile, last = share(M, 1)
    while tile < last:
        gate, value = project(
            p_x, p_matrix + tile * D, last - tile, num_lanes, M * D, D, True, True, EPS, BL, BR, BK, DOT, STAGES
        )
        o_r = tile + tl.arange(0, BR)
        mask = (o_l < num_lanes)[:, None] & (o_r < last)[None, :]
        tl.store(p_hidden + o_l[:, None] * M + o_r[None, :], silu(gate) * value, mask=mask)
        tile += BR


@triton.jit
def fetch_memory(
    unit,
    p_x,
    p_state,
    p_vector,
    num_units,
    D: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    DELTA: tl.constexpr,
    EPS: tl.constexpr,
    BD: tl.constexpr,
):
    """Fast weights of one lane's head, its forget gate and (delta rule) its write gate: all that does not wait for the
    projections. The small projections stay in float32, as their rounding would be felt over thousands of tokens."""
    o_n = tl.arange(0, N)
    exists = unit < num_units
    unit = tl.minimum(unit, num_units - 1)
    head, lane = unit % H, unit // H
    p_s = p_state + unit.to(tl.int64) * N * N + o_n[:, None] * N + o_n[None, :]
    weight = tl.load(p_s, mask=(o_n < N)[:, None] & exists, other=0.0, cache_modifier=".cg")
    forget = normed_dot(p_x + lane * D, p_vector + head * D, D, EPS, BD) + tl.load(p_vector + H * D + head)
    write = forget
    if DELTA:
        p_write = p_vector + H * (D + 1)
        write = normed_dot(p_x + lane * D, p_write + head * D, D, EPS, BD) + tl.load(p_write + H * D + head)
    return weight, sigmoid(forget), sigmoid(write)


@triton.jit
def memory_unit(
    unit,
    weight,
    forget,
    write,
    p_inner,
    p_y,
    p_state,
    p_lengths,
    step,
    D: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    DELTA: tl.constexpr,
    EPS: tl.constexpr,
):
    """Write and read one lane's head: inner `[B, 4D]` (query, key, value, gate) to y `[B, D]`, normalised and gated."""
    o_n = tl.arange(0, N)
    head, lane = unit % H, unit // H
    p_in = p_inner + lane * 4 * D + head * N + o_n
    q = silu(tl.load(p_in, cache_modifier=".cg"))
    k = silu(tl.load(p_in + D, cache_modifier=".cg"))
    v = tl.load(p_in + 2 * D, cache_modifier=".cg")
    gate = tl.load(p_in + 3 * D, cache_modifier=".cg")
    active = is_active(p_lengths, lane, True, step)
    q *= tl.rsqrt(tl.sum(q * q, 0) + EPS)
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    weight *= forget
    if DELTA:
        v = write * (v - tl.sum(weight * k[:, None], 0))
    weight += k[:, None] * v[None, :]
    read = tl.sum(weight * q[:, None], 0)
    y = read * tl.rsqrt(tl.sum(read * read, 0) / N + EPS) * silu(gate)
    tl.store(p_y + lane * D + head * N + o_n, y)
    p_s = p_state + unit.to(tl.int64) * N * N + o_n[:, None] * N + o_n[None, :]
    tl.store(p_s, weight, mask=(o_n < N)[:, None] & active)
