"""Activations that say themselves when they are there: 8 bytes each, a float32 and the number of its token.

What a phase reads of the phase before it, it polls until each value bears the token's number. That takes one round trip
to L2 where a barrier takes three (the stores, the counter, the loads), and needs no fence, since 8 bytes are stored at
once. Each value of a token has a place of its own: it is written again only after the barrier that ends the token.

Per layer: x `[D]` (its input), y `[D]` and the groups' values `[D]` (what out_proj reads), x `[D]` (what the SwiGLU
reads), hidden `[M]`, inner `[4D]`; then the decoder's x, padded to a layer's length, and the gates `[K]`.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.device import is_active, sigmoid, silu


@triton.jit
def value_of(packet):
    return packet.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def send(p_packets, value, epoch, mask):
    """Store values with the number of their token."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(p_packets, bits | (epoch.to(tl.int64) << 32), mask=mask)


@triton.jit
def receive(p_packets, epoch, PACK: tl.constexpr, SINGLE: tl.constexpr):
    """Values at p_packets (any shape), once all of a thread's bear the number `epoch`. PACK are polled at once."""
    if SINGLE:
        return value_of(tl.load(p_packets))
    else:
        epochs = tl.zeros(p_packets.shape, tl.int32) + epoch
        bits = epochs
        # A loop of one turn: the compiler would repeat the polling in each layout that its values are wanted in, but
        # not a loop.
        again = epoch
        while again > 0:
            if PACK == 8:
                bits = tl.inline_asm_elementwise(
                    """{ .reg .pred p; .reg .u32 e<8>; .reg .b64 d<8>;
                    POLL:
                    ld.relaxed.gpu.global.b64 d0, [$8];
                    ld.relaxed.gpu.global.b64 d1, [$9];
                    ld.relaxed.gpu.global.b64 d2, [$10];
                    ld.relaxed.gpu.global.b64 d3, [$11];
                    ld.relaxed.gpu.global.b64 d4, [$12];
                    ld.relaxed.gpu.global.b64 d5, [$13];
                    ld.relaxed.gpu.global.b64 d6, [$14];
                    ld.relaxed.gpu.global.b64 d7, [$15];
                    mov.b64 {$0, e0}, d0;
                    mov.b64 {$1, e1}, d1;
                    mov.b64 {$2, e2}, d2;
                    mov.b64 {$3, e3}, d3;
                    mov.b64 {$4, e4}, d4;
                    mov.b64 {$5, e5}, d5;
                    mov.b64 {$6, e6}, d6;
                    mov.b64 {$7, e7}, d7;
                    setp.ne.u32 p, e0, $16;
                    setp.ne.or.u32 p, e1, $16, p;
                    setp.ne.or.u32 p, e2, $16, p;
                    setp.ne.or.u32 p, e3, $16, p;
                    setp.ne.or.u32 p, e4, $16, p;
                    setp.ne.or.u32 p, e5, $16, p;
                    setp.ne.or.u32 p, e6, $16, p;
                    setp.ne.or.u32 p, e7, $16, p;
                    @p bra POLL; }""",
                    "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,l,l,l,l,l,l,l,r,r,r,r,r,r,r,r",
                    [p_packets, epochs], dtype=tl.int32, is_pure=False, pack=8,
                )  # fmt: skip
            elif PACK == 2:
                bits = tl.inline_asm_elementwise(
                    """{ .reg .pred p; .reg .u32 e<2>; .reg .b64 d<2>;
                    POLL:
                    ld.relaxed.gpu.global.b64 d0, [$2];
                    ld.relaxed.gpu.global.b64 d1, [$3];
                    mov.b64 {$0, e0}, d0;
                    mov.b64 {$1, e1}, d1;
                    setp.ne.u32 p, e0, $4;
                    setp.ne.or.u32 p, e1, $4, p;
                    @p bra POLL; }""",
                    "=&r,=&r,l,l,r,r",
                    [p_packets, epochs], dtype=tl.int32, is_pure=False, pack=2,
                )  # fmt: skip
            else:
                bits = tl.inline_asm_elementwise(
                    """{ .reg .pred p; .reg .u32 e; .reg .b64 d;
                    POLL:
                    ld.relaxed.gpu.global.b64 d, [$1];
                    mov.b64 {$0, e}, d;
                    setp.ne.u32 p, e, $2;
                    @p bra POLL; }""",
                    "=&r,l,r",
                    [p_packets, epochs], dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip
            again = epoch * 0
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def receive_channels(p_packets, epoch, K: tl.constexpr, F: tl.constexpr, PACK: tl.constexpr, SINGLE: tl.constexpr):
    """Channels 0 to K as [F]; those past K are zero."""
    o_f = tl.arange(0, F)
    value = receive(p_packets + o_f % K, epoch, PACK, SINGLE)
    return tl.where(o_f < K, value, 0.0)


@triton.jit
def as_columns(
    value, type: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr, BL: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Channels [F] as the operand of a product, [NB, KS, BL]; see `column_parts`. Chunks that F has not repeat others,
    as their products are not looked at."""
    CHUNKS: tl.constexpr = value.shape[0] // (NB * KS)
    REPEATS: tl.constexpr = BL // (2 if SPLIT else 1) // CHUNKS
    # Rounded before it is laid out anew, and once: each layout is a turn through shared memory.
    PARTS: tl.constexpr = 2 if SPLIT else 1
    columns = value.to(type)
    if SPLIT:
        columns = tl.join(columns, (value - columns.to(tl.float32)).to(type))
    columns = tl.permute(tl.reshape(columns, [CHUNKS, NB, KS, PARTS]), (1, 2, 0, 3))
    if REPEATS > 1:
        columns = tl.broadcast_to(columns[:, :, None, :, :], [NB, KS, REPEATS, CHUNKS, PARTS])
    return tl.reshape(columns, [NB, KS, BL])


@triton.jit
def normed_groups(
    y, value, gate, GROUP: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """y [F] times the RMS factor of its group in `value` [F] and the group's gate [F // GROUP]."""
    GROUPS: tl.constexpr = y.shape[0] // GROUP
    square = tl.sum(tl.reshape(value * value, [GROUPS, GROUP]), 1)
    factor = tl.rsqrt(square / GROUP + EPS) * gate
    return tl.reshape(tl.reshape(y, [GROUPS, GROUP]) * factor[:, None], [y.shape[0]])


@triton.jit
def normed_dot_packets(p_packets, p_w, D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """rms(x) . w for one float32 row w `[D]` and an x that this program has received."""
    o_k = tl.arange(0, BLOCK)
    w = tl.load(p_w + o_k, mask=o_k < D, other=0.0)
    x = value_of(tl.load(p_packets + o_k, mask=o_k < D, other=0, cache_modifier=".cg"))
    return tl.sum(x * w, 0) * tl.rsqrt(tl.sum(x * x, 0) / D + EPS)


@triton.jit
def send_gates(p_x, p_go, p_vector, epoch, D: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr):
    """The basal ganglia's gates `[K]`; the last programs begin, as they have the fewest rows of the phase."""
    column = tl.num_programs(0) - 1 - tl.program_id(0)
    while column < K:
        logit = normed_dot_packets(p_x, p_vector + column * D, D, EPS, BD)
        send(p_go + column, sigmoid(logit + tl.load(p_vector + K * D + column)), epoch, True)
        column += tl.num_programs(0)


@triton.jit
def relay_packets(
    token, step, p_ids, p_embedding, p_taps, p_packets,
    D: tl.constexpr, TAPS: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """As `relay_lane`, for a single lane."""
    o_j, o_d = tl.arange(0, TAPS), tl.arange(0, BD)
    inside = o_d < D
    ids = tl.where(o_j == 0, token, tl.load(p_ids + step + TAPS - 1 - o_j, mask=o_j > 0, other=0, cache_modifier=".cg"))
    p_e = p_embedding + (tl.maximum(ids, 0) * D)[:, None] + o_d[None, :]
    e = tl.load(p_e, mask=inside[None, :], other=0.0).to(tl.float32)
    gain = tl.load(p_taps + o_j[:, None] * D + o_d[None, :], mask=inside[None, :] & (ids >= 0)[:, None], other=0.0)
    scale = tl.rsqrt(tl.sum(e * e, 1) / D + EPS)
    send(p_packets + o_d, tl.sum(gain * e * scale[:, None], 0), step + 1, inside)


@triton.jit
def spike_packets(
    drive, o_n, mask, p_state, p_vector, p_group, p_lengths, step,
    D: tl.constexpr, C: tl.constexpr, GRADED: tl.constexpr, THETA: tl.constexpr, BETA: tl.constexpr,
    RHO: tl.constexpr,
):  # fmt: skip
    """As `spike_update`, for a single lane."""
    alpha = tl.load(p_vector + D * C + o_n, mask=mask, other=0.5)
    bias = tl.load(p_vector + D * C + D + o_n, mask=mask, other=0.0)
    voltage = tl.load(p_state + o_n, mask=mask, other=0.0, cache_modifier=".cg")
    adaptation = tl.load(p_state + D + o_n, mask=mask, other=0.0, cache_modifier=".cg")
    spikes = tl.load(p_state + 2 * D + o_n, mask=mask, other=0.0, cache_modifier=".cg")
    active = is_active(p_lengths, 0, True, step)
    o_c = tl.arange(0, C)[None, :]
    b_w = tl.load(p_vector + o_n[:, None] * C + o_c, mask=mask[:, None], other=0.0)
    p_s = p_state + 2 * D + (o_n // C * C)[:, None] + o_c
    b_s = tl.load(p_s, mask=mask[:, None], other=0.0, cache_modifier=".cg")
    lateral = tl.sum(b_w * b_s, 1)
    a = spikes + RHO * (adaptation - spikes)
    v = alpha * (voltage - THETA * spikes) + tl.sqrt(1.0 - alpha) * (drive + bias) + (1.0 - alpha) * lateral
    u = v - BETA * a - THETA
    s = tl.minimum(tl.maximum(u, 0.0), 4.0) if GRADED else tl.where(u > 0.0, 1.0, 0.0)
    s = tl.where(active, s, spikes)
    tl.store(p_state + o_n, v, mask=mask & active)
    tl.store(p_state + D + o_n, a, mask=mask & active)
    send(p_group + o_n, s, step + 1, mask)
    return s


@triton.jit
def fetch_unit(
    unit, p_x, p_state, p_vector, num_units,
    D: tl.constexpr, N: tl.constexpr, DELTA: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr, CU: tl.constexpr,
):  # fmt: skip
    """As `fetch_memory`, for a single lane."""
    H: tl.constexpr = D // N
    parts: tl.constexpr = N // CU
    exists = unit < num_units
    unit = tl.minimum(unit, num_units - 1)
    head = unit // parts
    o_n, o_v = tl.arange(0, N)[:, None], unit % parts * CU + tl.arange(0, CU)[None, :]
    weight = tl.load(p_state + head * N * N + o_n * N + o_v, mask=(o_n < N) & exists, other=0.0, cache_modifier=".cg")
    forget = normed_dot_packets(p_x, p_vector + head * D, D, EPS, BD) + tl.load(p_vector + H * D + head)
    write = forget
    if DELTA:
        p_write = p_vector + H * (D + 1)
        write = normed_dot_packets(p_x, p_write + head * D, D, EPS, BD) + tl.load(p_write + H * D + head)
    return weight, sigmoid(forget), sigmoid(write)


@triton.jit
def memory_packets(
    unit, weight, forget, write, p_inner, p_group, p_y, p_state, p_lengths, step,
    D: tl.constexpr, N: tl.constexpr, DELTA: tl.constexpr, EPS: tl.constexpr, CU: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """As `memory_unit`, for a single lane."""
    parts: tl.constexpr = N // CU
    head = unit // parts
    o_n, o_v = tl.arange(0, N), unit % parts * CU + tl.arange(0, CU)
    p_in = p_inner + head * N
    q = silu(receive(p_in + o_n, step + 1, 1, SINGLE))
    k = silu(receive(p_in + D + o_n, step + 1, 1, SINGLE))
    v = receive(p_in + 2 * D + o_v, step + 1, 1, SINGLE)
    gate = receive(p_in + 3 * D + o_v, step + 1, 1, SINGLE)
    active = is_active(p_lengths, 0, True, step)
    q *= tl.rsqrt(tl.sum(q * q, 0) + EPS)
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    weight *= forget
    if DELTA:
        v = write * (v - tl.sum(weight * k[:, None], 0))
    weight += k[:, None] * v[None, :]
    read = tl.sum(weight * q[:, None], 0)
    o_d = head * N + o_v
    send(p_group + o_d, read, step + 1, True)
    send(p_y + o_d, read * silu(gate), step + 1, True)
    tl.store(p_state + head * N * N + o_n[:, None] * N + o_v[None, :], weight, mask=(o_n < N)[:, None] & active)
