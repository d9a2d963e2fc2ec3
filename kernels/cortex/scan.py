"""Triton kernels of the cortex scan: one program runs one hyper-column for a tile of lanes through all T tokens.

Shape letters: B lanes, T tokens, D = K * C width, C neurons a column, L lanes a tile.

A step is a chain of dependent work (matrix product, membrane, spike, matrix product, ...), so its latency is what
counts, and the layout serves it:

- Neurons are the rows and lanes the columns of every product, `[C, C] x [C, L]`, so L can be 8, the least the tensor
  cores take. With one warp for 16 neurons each warp multiplies its own 16 rows of the weights, which never leave its
  registers; only the spikes cross warps, through shared memory.
- Memory holds lanes as rows and neurons side by side. A tile is read as `[C/16 * L, 16]`, so that a warp reads the
  16 neurons it will work on and turns them into its part of `[C, L]` without waiting for other warps.
- Inputs are asked for three tokens before they are used and wait in registers.
- Where storage is half precision, the forward product's operands are float16, whatever the storage: spikes lie in
  [-1, 4], so nothing overflows, and three bits more than bfloat16 keep u on its side of 0, where its derivative jumps
  from 0.2 to 1. (Rounded to bfloat16 instead, gradients come out up to 4 % off, with float16 below 1 %.)
- The loops over tokens are `while` loops: Triton's compiler reads a `for` loop's invariant dot operand from shared
  memory again at every step, and its interpreter rejects run-time `range` under some NumPy versions. Where registers
  are too few for the weights (RELOAD: 64 KB in float32), they are read from the cache at every token.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.cortex import spike as definition

CEILING = tl.constexpr(definition.GRADED_CEILING)
SMOOTH_LIMIT = tl.constexpr(definition.SMOOTH_LIMIT)
ROW = tl.constexpr(16)  # neurons a warp
UNSPECIALIZED = ("T", "B", "start_stride_b", "start_stride_t")  # one compiled kernel serves all their values


@triton.jit
def tile_rows(first_lane, B, L: tl.constexpr, C: tl.constexpr):
    """Lane and neuron of each element of a memory tile `[C/16 * L, 16]`, and whether the lane exists."""
    row = tl.arange(0, C // ROW * L)
    lane = first_lane + row % L
    neuron = (row // L * ROW)[:, None] + tl.arange(0, ROW)[None, :]
    return lane[:, None], neuron, (lane < B)[:, None]


@triton.jit
def to_neurons(x, L: tl.constexpr, C: tl.constexpr):
    """A memory tile `[C/16 * L, 16]` as float32 `[C, L]`."""
    x = tl.permute(tl.reshape(x, (C // ROW, L, ROW)), (0, 2, 1))
    return tl.reshape(x, (C, L)).to(tl.float32)


@triton.jit
def to_memory(x, L: tl.constexpr, C: tl.constexpr):
    """`[C, L]` as a memory tile `[C/16 * L, 16]`."""
    x = tl.permute(tl.reshape(x, (C // ROW, ROW, L)), (0, 2, 1))
    return tl.reshape(x, (C // ROW * L, ROW))


@triton.jit
def tanh(u):
    """tanh by exp, which the interpreter has too: (1 - e) / (1 + e), e = exp(-2 |u|), or where 1 - e would leave few
    digits the first terms of tanh's series, there 2e-9 off."""
    square = u * u
    small = u * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    e = tl.exp(-2.0 * tl.abs(u))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.015625, small, tl.where(u < 0, -size, size))


@triton.jit
def spike(u, KIND: tl.constexpr):
    """`kernels.cortex.spike.spike`."""
    if KIND == "graded":
        s = tl.minimum(tl.maximum(u, 0.0), CEILING)
    elif KIND == "binary":
        s = (u > 0).to(tl.float32)
    else:
        s = tanh(u)
    return s


@triton.jit
def spike_derivative(u, KIND: tl.constexpr):
    """`kernels.cortex.spike.derivative`."""
    if KIND == "graded":
        slope = tl.where((u > 0) & (u < CEILING), 1.0, 0.2 / (1.0 + 9.0 * u * u))
    elif KIND == "binary":
        slope = 1.0 / (1.0 + 9.869604401089358 * u * u)
    else:  # 1 - tanh^2, with no difference of nearly equal numbers
        e = tl.exp(-2.0 * tl.abs(u))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return slope


@triton.jit
def saturates(u, KIND: tl.constexpr):
    """Whether a graded or smooth spike is at its ceiling; a binary one is whenever it fires."""
    return u >= CEILING if KIND == "graded" else tl.abs(u) >= SMOOTH_LIMIT


@triton.jit(do_not_specialize=UNSPECIALIZED)
def cortex_forward_kernel(
    drive,
    lateral_weight,
    decay,
    initial_voltage,
    initial_adaptation,
    initial_spikes,
    document_start,
    spikes,
    excess,
    final_voltage,
    final_adaptation,
    final_spikes,
    counts,
    T,
    B,
    D,
    drive_stride_b,
    drive_stride_t,
    start_stride_b,
    start_stride_t,
    C: tl.constexpr,
    L: tl.constexpr,
    KIND: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ADAPTATION_STRENGTH: tl.constexpr,
    ADAPTATION_DECAY: tl.constexpr,
    HAS_START: tl.constexpr,
    RELOAD: tl.constexpr,
    SAVE: tl.constexpr,
):
    first_neuron = tl.program_id(0).to(tl.int64) * C
    first_lane = tl.program_id(1) * L
    lane, neuron, exists = tile_rows(first_lane, B, L, C)
    c = tl.arange(0, C)
    lanes = first_lane + tl.arange(0, L)
    state_offset = lane.to(tl.int64) * D + first_neuron + neuron
    token_offset = lane.to(tl.int64) * T * D + first_neuron + neuron
    drive_offset = lane.to(tl.int64) * drive_stride_b + first_neuron + neuron
    start_offset = lanes.to(tl.int64) * start_stride_b
    inside = lanes < B

    alpha = tl.load(decay + first_neuron + c)[:, None]
    weights = lateral_weight + first_neuron * C + c[:, None] * C + c[None, :]
    operand: tl.constexpr = tl.float32 if drive.dtype.element_ty == tl.float32 else tl.float16
    weight = tl.load(weights).to(operand)
    gain = tl.sqrt(1.0 - alpha)
    reset = alpha * THRESHOLD
    v = to_neurons(tl.load(initial_voltage + state_offset, mask=exists, other=0.0), L, C)
    a = to_neurons(tl.load(initial_adaptation + state_offset, mask=exists, other=0.0), L, C)
    s = to_neurons(tl.load(initial_spikes + state_offset, mask=exists, other=0.0), L, C)
    num_fired = tl.zeros((C, L), tl.int32)
    num_saturated = tl.zeros((C, L), tl.int32)

    x0 = tl.load(drive + drive_offset, mask=exists & (T > 0), other=0.0)
    drive += drive_stride_t
    x1 = tl.load(drive + drive_offset, mask=exists & (T > 1), other=0.0)
    drive += drive_stride_t
    x2 = tl.load(drive + drive_offset, mask=exists & (T > 2), other=0.0)
    if HAS_START:
        f0 = tl.load(document_start + start_offset, mask=inside & (T > 0), other=0)
        document_start += start_stride_t
        f1 = tl.load(document_start + start_offset, mask=inside & (T > 1), other=0)
        document_start += start_stride_t
        f2 = tl.load(document_start + start_offset, mask=inside & (T > 2), other=0)
    t = 0
    while t < T:
        if HAS_START:
            kept = (f0 == 0)[None, :]
            v = tl.where(kept, v, 0.0)
            a = tl.where(kept, a, 0.0)
            s = tl.where(kept, s, 0.0)
            f0 = f1
            f1 = f2
            document_start += start_stride_t
            f2 = tl.load(document_start + start_offset, mask=inside & (t + 3 < T), other=0)
        x = to_neurons(x0, L, C)
        x0 = x1
        x1 = x2
        drive += drive_stride_t
        x2 = tl.load(drive + drive_offset, mask=exists & (t + 3 < T), other=0.0)
        pre = alpha * v - reset * s + gain * x
        a = ADAPTATION_DECAY * a + (1.0 - ADAPTATION_DECAY) * s
        w = tl.load(weights).to(operand) if RELOAD else weight
        v = pre + (1.0 - alpha) * tl.dot(w, s.to(operand), input_precision="ieee")
        u = v - THRESHOLD - ADAPTATION_STRENGTH * a
        s = spike(u, KIND)
        num_fired += (u > 0).to(tl.int32)
        if KIND != "binary":
            num_saturated += saturates(u, KIND).to(tl.int32)
        stored = to_memory(u.to(spikes.dtype.element_ty), L, C)
        if SAVE:
            tl.store(excess + token_offset, stored, mask=exists)
        tl.store(spikes + token_offset, spike(stored.to(tl.float32), KIND).to(spikes.dtype.element_ty), mask=exists)
        spikes += D
        excess += D
        t += 1
    tl.store(final_voltage + state_offset, to_memory(v, L, C), mask=exists)
    tl.store(final_adaptation + state_offset, to_memory(a, L, C), mask=exists)
    tl.store(final_spikes + state_offset, to_memory(s, L, C), mask=exists)
    count_offset = tl.program_id(1).to(tl.int64) * 2 * D + first_neuron + c
    num_fired = tl.sum(tl.where(inside[None, :], num_fired, 0), 1)
    tl.store(counts + count_offset, num_fired)
    if KIND != "binary":
        num_saturated = tl.sum(tl.where(inside[None, :], num_saturated, 0), 1)
        tl.store(counts + count_offset + D, num_saturated)
    else:
        tl.store(counts + count_offset + D, num_fired)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def cortex_backward_kernel(
    grad_spikes,
    excess,
    lateral_weight,
    decay,
    initial_voltage,
    initial_adaptation,
    initial_spikes,
    document_start,
    grad_final_voltage,
    grad_final_adaptation,
    grad_final_spikes,
    grad_drive,
    grad_initial_voltage,
    grad_initial_adaptation,
    grad_initial_spikes,
    leak_sums,
    T,
    B,
    D,
    grad_stride_b,
    grad_stride_t,
    grad_drive_stride_b,
    grad_drive_stride_t,
    start_stride_b,
    start_stride_t,
    C: tl.constexpr,
    L: tl.constexpr,
    KIND: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ADAPTATION_STRENGTH: tl.constexpr,
    ADAPTATION_DECAY: tl.constexpr,
    HAS_START: tl.constexpr,
    RELOAD: tl.constexpr,
):
    first_neuron = tl.program_id(0).to(tl.int64) * C
    first_lane = tl.program_id(1) * L
    lane, neuron, exists = tile_rows(first_lane, B, L, C)
    c = tl.arange(0, C)
    lanes = first_lane + tl.arange(0, L)
    inside = lanes < B
    state_offset = lane.to(tl.int64) * D + first_neuron + neuron
    token_offset = (lane.to(tl.int64) + 1) * T * D + first_neuron + neuron
    grad_offset = lane.to(tl.int64) * grad_stride_b + (T - 1).to(tl.int64) * grad_stride_t + first_neuron + neuron
    grad_drive_offset = lane.to(tl.int64) * grad_drive_stride_b + first_neuron + neuron
    grad_drive += (T - 1).to(tl.int64) * grad_drive_stride_t
    start_offset = lanes.to(tl.int64) * start_stride_b + (T - 1).to(tl.int64) * start_stride_t

    alpha = tl.load(decay + first_neuron + c)[:, None]
    gain = tl.sqrt(1.0 - alpha)
    reset = alpha * THRESHOLD
    weights = lateral_weight + first_neuron * C + c[None, :] * C + c[:, None]  # transposed
    operand: tl.constexpr = grad_drive.dtype.element_ty
    weight_scale = tl.sqrt(1.0 - tl.load(decay + first_neuron + c))[None, :]
    weight = (tl.load(weights).to(tl.float32) * weight_scale).to(operand)

    # Gradients to what the next token receives from this one: v, a and s after this token.
    next_v = to_neurons(tl.load(grad_final_voltage + state_offset, mask=exists, other=0.0), L, C)
    next_a = to_neurons(tl.load(grad_final_adaptation + state_offset, mask=exists, other=0.0), L, C)
    next_s = to_neurons(tl.load(grad_final_spikes + state_offset, mask=exists, other=0.0), L, C)
    # The part of alpha's gradient that the voltage decides, sum_t dv_t (v_{t-1} - theta s_{t-1}). v is not stored, but
    # v = u + theta + beta a, and sum_t dv_t a_{t-1} is what a backward pass through a's own recurrence gives.
    leaked = tl.zeros((C, L), tl.float32)
    to_voltage = tl.zeros((C, L), tl.float32)  # dv of the next token
    to_adaptation = tl.zeros((C, L), tl.float32)  # of that sum, to the adaptation of the next token

    excess -= D
    u0 = tl.load(excess + token_offset, mask=exists, other=0.0)
    excess -= D
    u1 = tl.load(excess + token_offset, mask=exists & (T > 1), other=0.0)
    excess -= D
    u2 = tl.load(excess + token_offset, mask=exists & (T > 2), other=0.0)
    g0 = tl.load(grad_spikes + grad_offset, mask=exists, other=0.0)
    grad_spikes -= grad_stride_t
    g1 = tl.load(grad_spikes + grad_offset, mask=exists & (T > 1), other=0.0)
    grad_spikes -= grad_stride_t
    g2 = tl.load(grad_spikes + grad_offset, mask=exists & (T > 2), other=0.0)
    if HAS_START:
        f0 = tl.load(document_start + start_offset, mask=inside, other=0)
        document_start -= start_stride_t
        f1 = tl.load(document_start + start_offset, mask=inside & (T > 1), other=0)
        document_start -= start_stride_t
        f2 = tl.load(document_start + start_offset, mask=inside & (T > 2), other=0)
    t = 0
    while t < T:
        u = to_neurons(u0, L, C)
        ds = to_neurons(g0, L, C) + next_s
        u0 = u1
        u1 = u2
        g0 = g1
        g1 = g2
        excess -= D
        grad_spikes -= grad_stride_t
        u2 = tl.load(excess + token_offset, mask=exists & (t + 3 < T), other=0.0)
        g2 = tl.load(grad_spikes + grad_offset, mask=exists & (t + 3 < T), other=0.0)

        s = spike(u, KIND)
        leaked += to_voltage * (u + THRESHOLD - THRESHOLD * s)
        leaked += (ADAPTATION_STRENGTH * (1.0 - ADAPTATION_DECAY)) * (to_adaptation * s)
        to_adaptation = to_voltage + ADAPTATION_DECAY * to_adaptation

        du = ds * spike_derivative(u, KIND)
        dv = next_v + du
        da = next_a - ADAPTATION_STRENGTH * du
        dx = (gain * dv).to(operand)
        next_v = alpha * dv
        next_a = ADAPTATION_DECAY * da
        next_s = (1.0 - ADAPTATION_DECAY) * da - reset * dv
        w = (tl.load(weights).to(tl.float32) * weight_scale).to(operand) if RELOAD else weight
        next_s = tl.dot(w, dx, next_s, input_precision="ieee")
        to_voltage = dv
        if HAS_START:
            kept = (f0 == 0)[None, :]
            next_v = tl.where(kept, next_v, 0.0)
            next_a = tl.where(kept, next_a, 0.0)
            next_s = tl.where(kept, next_s, 0.0)
            to_voltage = tl.where(kept, to_voltage, 0.0)
            to_adaptation = tl.where(kept, to_adaptation, 0.0)
            f0 = f1
            f1 = f2
            document_start -= start_stride_t
            f2 = tl.load(document_start + start_offset, mask=inside & (t + 3 < T), other=0)
        tl.store(grad_drive + grad_drive_offset, to_memory(dx, L, C), mask=exists)
        grad_drive -= grad_drive_stride_t
        t += 1
    tl.store(grad_initial_voltage + state_offset, to_memory(next_v, L, C), mask=exists)
    tl.store(grad_initial_adaptation + state_offset, to_memory(next_a, L, C), mask=exists)
    tl.store(grad_initial_spikes + state_offset, to_memory(next_s, L, C), mask=exists)
    v = to_neurons(tl.load(initial_voltage + state_offset, mask=exists, other=0.0), L, C)
    a = to_neurons(tl.load(initial_adaptation + state_offset, mask=exists, other=0.0), L, C)
    s = to_neurons(tl.load(initial_spikes + state_offset, mask=exists, other=0.0), L, C)
    leaked += to_voltage * (v - THRESHOLD * s)
    leaked += ADAPTATION_STRENGTH * to_adaptation * (ADAPTATION_DECAY * a + (1.0 - ADAPTATION_DECAY) * s)
    tl.store(leak_sums + tl.program_id(1).to(tl.int64) * D + first_neuron + c, tl.sum(leaked, 1))
