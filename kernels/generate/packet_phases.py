"""What surrounds the products of a single lane: the relay, neurons, gates and memory units, from packets to packets."""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.activations import get, room_place, still_put
from kernels.generate.asking import release
from kernels.generate.device import is_active, sigmoid, silu
from kernels.generate.packets import (
    append,
    load_four,
    prefetch,
    receive_pairs,
    send,
    send_here,
    store_four,
    store_here,
    value_of,
)
from kernels.generate.ring import sum_of_row
from kernels.generate.sampling import relayed


@triton.jit
def normed_dot_packets(p_packets, p_w, D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """rms(x) . w for one float32 row w `[D]` and an x that this program has received."""
    o_k = tl.arange(0, BLOCK)
    w = tl.load(p_w + o_k, mask=o_k < D, other=0.0)
    x = value_of(tl.load(p_packets + o_k, mask=o_k < D, other=0, cache_modifier=".cg"))
    return tl.sum(x * w, 0) * tl.rsqrt(tl.sum(x * x, 0) / D + EPS)


@triton.jit
def send_gates(p_x, p_go, p_vector, epoch, D: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr):
    """The basal ganglia's gates `[K]`; they are dealt out from the last program on, memory units from the first."""
    column = tl.num_programs(0) - 1 - tl.program_id(0)
    while column < K:
        logit = normed_dot_packets(p_x, p_vector + column * D, D, EPS, BD)
        send(p_go + column, sigmoid(logit + tl.load(p_vector + K * D + column)), epoch, True)
        column += tl.num_programs(0)


@triton.jit
def relay_packets(
    token, step, recent, p_embedding, p_taps, p_packets,
    D: tl.constexpr, TAPS: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """As `relay_columns`, for a single lane."""
    o_d = tl.arange(0, BD)
    x = relayed(token, recent, p_embedding, p_taps, D, TAPS, EPS, BD)
    send(p_packets + o_d, x, step + 1, o_d < D)


@triton.jit
def lateral_sum(
    o_n, rows, thread, p_spikes, p_lateral, D: tl.constexpr, C: tl.constexpr, SHARE: tl.constexpr
):  # fmt: skip
    """R s for neurons o_n, from the last token's spikes; each of a row's SHARE threads takes a part of its column."""
    if SHARE == 1:
        o_c = tl.arange(0, C)[None, :]
        b_w = tl.load(p_lateral + o_n[:, None] * C + o_c, mask=rows[:, None], other=0.0)
        p_s = p_spikes + (o_n // C * C)[:, None] + o_c
        return tl.sum(b_w * tl.load(p_s, mask=rows[:, None], other=0.0, cache_modifier=".cg"), 1)
    else:
        o_n = tl.minimum(o_n, D - 1)  # rows past the last are not stored
        p_w, p_s = p_lateral + o_n * C + thread % SHARE, p_spikes + o_n // C * C + thread % SHARE
        total = tl.zeros(o_n.shape, tl.float32)
        for i in tl.static_range(0, C, SHARE):
            total += tl.load(p_w + i) * tl.load(p_s + i, cache_modifier=".cg")
        return sum_of_row(total)


@triton.jit
def ask_for_neurons(
    what, o_r, thread, p_vectors, num_wernicke, num_memory, D: tl.constexpr, C: tl.constexpr,
    SHARE: tl.constexpr, CORTEX: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """Have what `fetch_neurons` reads of a layer's vectors brought to L2, for the rows of a turn, whose word in
    `TurnTable` is `what`. CORTEX and MEMORY are the lengths of a layer's vectors."""
    layer = ((what >> 24) & 4095).to(tl.int32)
    before = tl.where(layer < num_wernicke, 0, num_memory)
    p_vector = p_vectors + (layer - before) * CORTEX + before * MEMORY
    o_n = tl.minimum(((what >> 36) & 0xFFFFFF).to(tl.int32) + o_r, D - 1)
    prefetch(p_vector + o_n * C + thread % SHARE * (C // SHARE), False)
    prefetch(p_vector + D * C + tl.where(thread % SHARE == 0, 0, D) + o_n, False)


@triton.jit
def fetch_neurons(
    o_n, rows, thread, p_state, p_vector,
    D: tl.constexpr, C: tl.constexpr, SHARE: tl.constexpr, THETA: tl.constexpr, RHO: tl.constexpr,
):  # fmt: skip
    """What of neurons o_n does not wait for their drive: the voltage without it, its factor and its bias, the new
    adaptation and the old spikes."""
    alpha = tl.load(p_vector + D * C + o_n, mask=rows, other=0.5)
    bias = tl.load(p_vector + D * C + D + o_n, mask=rows, other=0.0)
    voltage = tl.load(p_state + o_n, mask=rows, other=0.0, cache_modifier=".cg")
    adaptation = tl.load(p_state + D + o_n, mask=rows, other=0.0, cache_modifier=".cg")
    spikes = tl.load(p_state + 2 * D + o_n, mask=rows, other=0.0, cache_modifier=".cg")
    lateral = lateral_sum(o_n, rows, thread, p_state + 2 * D, p_vector, D, C, SHARE)
    still = alpha * (voltage - THETA * spikes) + (1.0 - alpha) * lateral
    return still, tl.sqrt(1.0 - alpha), bias, spikes + RHO * (adaptation - spikes), spikes


@triton.jit
def spike_packets(
    drive, still, gain, bias, a, spikes, o_n, mask, p_state, p_group, p_lengths, step,
    D: tl.constexpr, GRADED: tl.constexpr, THETA: tl.constexpr, BETA: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """The ALIF update of neurons o_n, with what `fetch_neurons` gives, as in `cortex_in`: their spikes, which are
    returned and go out as packets; voltage and adaptation are written in place, `[3, D]` at p_state."""
    active = is_active(p_lengths, 0, True, step)
    v = still + gain * (drive + bias)
    u = v - BETA * a - THETA
    s = tl.minimum(tl.maximum(u, 0.0), 4.0) if GRADED else tl.where(u > 0.0, 1.0, 0.0)
    s = tl.where(active, s, spikes)
    store_here(p_state + o_n, v, mask & active, SINGLE)
    store_here(p_state + D + o_n, a, mask & active, SINGLE)
    send_here(p_group + o_n, s, step + 1, mask, SINGLE)
    return s


@triton.jit
def ask_for_unit(unit, p_state, p_vector, D: tl.constexpr, N: tl.constexpr, DELTA: tl.constexpr, CU: tl.constexpr,
                 BD: tl.constexpr, SINGLE: tl.constexpr):  # fmt: skip
    """Have what `memory_packets` reads brought to L2."""
    if unit < D // CU:
        head = unit // (N // CU)
        prefetch(p_state + head * N * N + tl.arange(0, N) * N + unit % (N // CU) * CU, SINGLE)
        LINES: tl.constexpr = BD // 32 if BD > 32 else 1
        o_k = tl.minimum(tl.arange(0, LINES) * 32, D - 1)
        prefetch(p_vector + head * D + o_k, SINGLE)
        if DELTA:
            prefetch(p_vector + D // N * (D + 1) + head * D + o_k, SINGLE)


@triton.jit
def times(four, x):
    return four[0] * x, four[1] * x, four[2] * x, four[3] * x


@triton.jit
def plus(four, more):
    return four[0] + more[0], four[1] + more[1], four[2] + more[2], four[3] + more[3]


@triton.jit
def add_2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def add_7(a0, a1, a2, a3, a4, a5, a6, b0, b1, b2, b3, b4, b5, b6):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6


@triton.jit
def add_11(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10):
    return (
        a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8, a9 + b9, a10 + b10
    )  # fmt: skip


@triton.jit
def sum_together(values, SINGLE: tl.constexpr):
    """Sums over the first axis of 2, 7 or 11 tensors, which take one exchange between warps."""
    COUNT: tl.constexpr = len(values)
    if SINGLE:
        sums = ()
        for i in tl.static_range(COUNT):
            sums = append(sums, tl.sum(values[i], 0))
    elif COUNT == 2:
        sums = tl.reduce(values, 0, add_2)
    elif COUNT == 7:
        sums = tl.reduce(values, 0, add_7)
    else:
        sums = tl.reduce(values, 0, add_11)
    return sums


@triton.jit
def unit_gates(
    room, p_x, square, p_w, head,
    D: tl.constexpr, N: tl.constexpr, DELTA: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """A head's forget and write gates, from the phase's activations, still in the room in terms of UNIT, and their sum
    of squares."""
    H: tl.constexpr = D // N
    o_k = tl.arange(0, BD)
    bias = tl.load(p_w + H * D + head)
    w = tl.load(p_w + head * D + o_k, mask=o_k < D, other=0.0)
    if DELTA:
        p_write = p_w + H * (D + 1)
        write_bias = tl.load(p_write + H * D + head)
        write_w = tl.load(p_write + head * D + o_k, mask=o_k < D, other=0.0)
    if SINGLE:
        x = value_of(tl.load(p_x + o_k, mask=o_k < D, other=0))
    else:
        x = get(still_put(room) + room_place(tl.minimum(o_k, D - 1)), PURE=True) * (1 / UNIT)
    scale = tl.rsqrt(square / D + EPS)
    if DELTA:
        forget, write = sum_together((w * x, write_w * x), SINGLE)
        return sigmoid(forget * scale + bias), sigmoid(write * scale + write_bias)
    else:
        forget = sigmoid(tl.sum(w * x, 0) * scale + bias)
        return forget, forget


@triton.jit
def memory_packets(
    unit, room, states, square, p_x, p_vector, p_inner, p_group, p_y, p_state, p_lengths, step,
    D: tl.constexpr, N: tl.constexpr, DELTA: tl.constexpr, EPS: tl.constexpr, CU: tl.constexpr, BD: tl.constexpr,
    UNIT: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """As `memory_unit`, for a single lane: CU value channels of a head.

    What it reads beside q, k, v and the gate is asked for first, while those are on their way. Then one exchange
    between warps is enough: with W the state before, f the forgetting, S what W becomes and u what is written to it,
    S^T q = f W^T q + (k . q) u, and u needs W^T k alone, so all these products, and the norms of q and k, which are
    factors, are summed at the same time. A thread has four neighbouring channels of Q rows of W.
    """
    PARTS: tl.constexpr = N // CU
    NR: tl.constexpr = min(N, 64)
    Q: tl.constexpr = N // NR
    epoch = step + 1
    head = unit // PARTS
    o_n, o_g = tl.arange(0, NR)[:, None], tl.arange(0, CU // 4)[None, :] * 4
    first = head * N + unit % PARTS * CU
    p_w = p_state + head * N * N + unit % PARTS * CU + (o_n * N + o_g)
    p_here = p_inner + first + (o_n * 0 + o_g)
    p_head = p_inner + head * N + (o_n + o_g * 0)
    w = ()
    for i in tl.static_range(Q):
        # Not `append`: Triton 3.6 names a compiled function by its arguments with their tuples opened, so one tuple and
        # four numbers are the same call to it.
        w = w + (load_four(p_w + i * (NR * N), SINGLE),)  # type: ignore[assignment]  # noqa: RUF005
    active = is_active(p_lengths, 0, True, step)
    forget, write = unit_gates(room, p_x, square, p_vector, head, D, N, DELTA, EPS, BD, UNIT, SINGLE)

    p = (p_here + 2 * D, p_here + (2 * D + 2), p_here + 3 * D, p_here + (3 * D + 2))
    for i in tl.static_range(Q):
        p = append(append(p, p_head + i * NR), p_head + (D + i * NR))
    got = receive_pairs(p, epoch, states, 4, SINGLE)
    v = (got[0], got[4], got[1], got[5])
    gate = (got[2], got[6], got[3], got[7])
    q, k = silu(got[8]), silu(got[9])
    ks = (k,)
    w_q, w_k, norms = times(w[0], q), times(w[0], k), (q * q, k * k, q * k)  # type: ignore[misc]
    for i in tl.static_range(1, Q):
        q, k = silu(got[8 + 2 * i]), silu(got[9 + 2 * i])
        ks = append(ks, k)
        w_q, w_k = plus(w_q, times(w[i], q)), plus(w_k, times(w[i], k))
        norms = (norms[0] + q * q, norms[1] + k * k, norms[2] + q * k)
    sums = sum_together(w_q + norms + w_k if DELTA else w_q + norms, SINGLE)
    q_factor, k_factor = tl.rsqrt(sums[4] + EPS)[None, :], tl.rsqrt(sums[5] + EPS)[None, :]
    release(states, 0, SINGLE)
    overlap = sums[6][None, :] * q_factor * k_factor
    written, read = (), ()
    for j in tl.static_range(4):
        u = v[j]
        if DELTA:
            u = write * (u - forget * k_factor * sums[7 + j][None, :])
        written = append(written, u)
        read = append(read, forget * q_factor * sums[j][None, :] + overlap * u)

    # All threads have all of it: four rows of them send what is read, and the next four the same behind the gate.
    row = o_n & 3
    here = tl.where(row < 2, tl.where(row == 0, read[0], read[1]), tl.where(row == 2, read[2], read[3]))  # type: ignore[misc]
    by = tl.where(row < 2, tl.where(row == 0, gate[0], gate[1]), tl.where(row == 2, gate[2], gate[3]))
    plain = o_n < 4
    p_out = tl.where(plain, p_group, p_y) + first + (o_g + row)
    send_here(p_out, tl.where(plain, here, here * silu(by)), epoch, (o_n < 8) & (o_g >= 0), SINGLE)

    for i in tl.static_range(Q):
        k = ks[i] * k_factor
        new = ()
        for j in tl.static_range(4):
            new = append(new, forget * w[i][j] + k * written[j])  # type: ignore[misc]
        store_four(p_w + i * (NR * N), new, active & (o_n >= 0) & (o_g >= 0), SINGLE)
