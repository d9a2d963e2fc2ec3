"""What surrounds the products of a single lane: the relay, neurons, gates and memory units, from packets to packets."""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.device import is_active, sigmoid, silu
from kernels.generate.packets import prefetch, receive, send, send_here, store_here, value_of


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
def fetch_neurons(
    o_n, mask, p_state, p_vector, D: tl.constexpr, C: tl.constexpr, THETA: tl.constexpr, RHO: tl.constexpr,
):  # fmt: skip
    """What of neurons o_n does not wait for their drive: the voltage without it, its factor and its bias, the new
    adaptation and the old spikes."""
    alpha = tl.load(p_vector + D * C + o_n, mask=mask, other=0.5)
    bias = tl.load(p_vector + D * C + D + o_n, mask=mask, other=0.0)
    voltage = tl.load(p_state + o_n, mask=mask, other=0.0, cache_modifier=".cg")
    adaptation = tl.load(p_state + D + o_n, mask=mask, other=0.0, cache_modifier=".cg")
    spikes = tl.load(p_state + 2 * D + o_n, mask=mask, other=0.0, cache_modifier=".cg")
    o_c = tl.arange(0, C)[None, :]
    b_w = tl.load(p_vector + o_n[:, None] * C + o_c, mask=mask[:, None], other=0.0)
    p_s = p_state + 2 * D + (o_n // C * C)[:, None] + o_c
    b_s = tl.load(p_s, mask=mask[:, None], other=0.0, cache_modifier=".cg")
    lateral = tl.sum(b_w * b_s, 1)
    still = alpha * (voltage - THETA * spikes) + (1.0 - alpha) * lateral
    return still, tl.sqrt(1.0 - alpha), bias, spikes + RHO * (adaptation - spikes), spikes


@triton.jit
def spike_packets(
    drive, still, gain, bias, a, spikes, o_n, mask, p_state, p_group, p_lengths, step,
    D: tl.constexpr, GRADED: tl.constexpr, THETA: tl.constexpr, BETA: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """As `spike_update`, for a single lane and with what `fetch_neurons` gives."""
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
    """Have what `fetch_unit` reads brought to L2."""
    if unit < D // CU:
        head = unit // (N // CU)
        prefetch(p_state + head * N * N + tl.arange(0, N) * N + unit % (N // CU) * CU, SINGLE)
        LINES: tl.constexpr = BD // 32 if BD > 32 else 1
        o_k = tl.minimum(tl.arange(0, LINES) * 32, D - 1)
        prefetch(p_vector + head * D + o_k, SINGLE)
        if DELTA:
            prefetch(p_vector + D // N * (D + 1) + head * D + o_k, SINGLE)


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
    q, k = receive((p_in + o_n, p_in + D + o_n), step + 1, 1, SINGLE)
    v, gate = receive((p_in + 2 * D + o_v, p_in + 3 * D + o_v), step + 1, 1, SINGLE)
    q, k = silu(q), silu(k)
    active = is_active(p_lengths, 0, True, step)
    q *= tl.rsqrt(tl.sum(q * q, 0) + EPS)
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    weight *= forget
    if DELTA:
        v = write * (v - tl.sum(weight * k[:, None], 0))
    weight += k[:, None] * v[None, :]
    read = tl.sum(weight * q[:, None], 0)
    o_d = head * N + o_v
    here = o_v >= 0
    send_here(p_group + o_d, read, step + 1, here, SINGLE)
    send_here(p_y + o_d, read * silu(gate), step + 1, here, SINGLE)
    tl.store(p_state + head * N * N + o_n[:, None] * N + o_v[None, :], weight, mask=(o_n < N)[:, None] & active)
