"""The cortex scan for few lanes: one program runs one hyper-column for one lane through all T tokens.

What is computed is what `scan.py` computes, and the arguments are its kernels'. A tile there has eight lanes, the least
a product takes; with one lane seven eighths of the work on the state are on nothing, and a step takes as long as the
chain of what depends on what. Here the chain is shorter:

- A warp has 32 neurons and every thread four of them: its quarters. Quarter (i, j) of all threads is a quarter of the
  product's inner dimension and a product of its own, so that four sums are built up side by side instead of one.
- The threads' layout of the product's result is that of memory too, so nothing but the spikes goes through shared
  memory, and of the product's eight equal columns one is kept and nothing is computed twice in a thread.
- Four threads have the same neurons. Where a thread would have four numbers to store, it stores one.

Thread n = 32 g + 4 r + q has neurons i C/2 + 16 g + 8 j + r for i, j in (0, 1): the rows that the tensor cores give
it. Tensors `[C]` are by thread, tensors `[C, 2, 2]` by thread, i and j.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.cortex.scan import CEILING, SMOOTH_LIMIT, UNSPECIALIZED, spike, spike_derivative


@triton.jit
def thread_rows(C: tl.constexpr):
    """Of every thread, its first neuron and which of the four threads with these neurons it is, `[C]` each."""
    thread = tl.arange(0, C)
    return thread // 32 * 16 + thread // 4 % 8, thread % 4


@triton.jit
def load_quarters(ptr, row, mask, C: tl.constexpr):
    """`[C, 2, 2]` from C numbers in memory, each read by four threads."""
    first = tl.join(
        tl.load(ptr + row, mask=mask, other=0.0),
        tl.load(ptr + row + C // 2, mask=mask, other=0.0),
    )
    second = tl.join(
        tl.load(ptr + row + 8, mask=mask, other=0.0),
        tl.load(ptr + row + (C // 2 + 8), mask=mask, other=0.0),
    )
    return tl.join(first, second)


@triton.jit
def halves(x, which):
    """For j = 0 and for j = 1, quarter (0, j) or, where `which` holds, (1, j), `[C]` each."""
    first, second = tl.split(x)
    first, first_alternative = tl.split(first)
    second, second_alternative = tl.split(second)
    return tl.where(which, first_alternative, first), tl.where(which, second_alternative, second)


@triton.jit
def own_quarter(x, q):
    """Of every thread quarter (q % 2, q // 2), `[C]`."""
    first, second = halves(x, q % 2 == 1)
    return tl.where(q >= 2, second, first)


@triton.jit
def load_weight_quarters(weights, stride, ROWS_STRIDE: tl.constexpr, C: tl.constexpr):
    """`[C, C/4]` four times: all rows, and the columns whose neurons are quarter (0, 0), (1, 0), (0, 1), (1, 1)."""
    k = tl.arange(0, C // 4)
    offset = tl.arange(0, C)[:, None] * ROWS_STRIDE + (k // 8 * 16 + k % 8)[None, :] * stride
    return (
        tl.load(weights + offset),
        tl.load(weights + offset + C // 2 * stride),
        tl.load(weights + offset + 8 * stride),
        tl.load(weights + offset + (C // 2 + 8) * stride),
    )


@triton.jit
def as_factor(x, C: tl.constexpr):
    """A quarter `[C]` as the second factor of a product, `[C/4, 8]` with equal columns."""
    return tl.reshape(tl.broadcast_to(tl.reshape(x, (C // 4, 4, 1)), (C // 4, 4, 2)), (C // 4, 8))


@triton.jit
def from_product(x, C: tl.constexpr):
    """The result of a product, `[C, 8]` with equal columns, as `[C, 2, 2]`."""
    x, _ = tl.split(tl.reshape(x, (C, 4, 2)))
    x = tl.permute(tl.reshape(x, (2, C // 32, 2, 8, 4)), (1, 3, 4, 0, 2))
    return tl.reshape(x, (C, 2, 2))


@triton.jit
def product(w00, w10, w01, w11, x, C: tl.constexpr):
    """The weights times x `[C, 2, 2]`, in float32."""
    first, second = tl.split(x)
    x00, x10 = tl.split(first)
    x01, x11 = tl.split(second)
    x00 = as_factor(x00, C)
    x10 = as_factor(x10, C)
    x01 = as_factor(x01, C)
    x11 = as_factor(x11, C)
    sum00 = from_product(tl.dot(w00, x00, input_precision="ieee"), C)
    sum10 = from_product(tl.dot(w10, x10, input_precision="ieee"), C)
    sum01 = from_product(tl.dot(w01, x01, input_precision="ieee"), C)
    sum11 = from_product(tl.dot(w11, x11, input_precision="ieee"), C)
    return (sum00 + sum10) + (sum01 + sum11)


@triton.jit
def counted(u, is_odd, KIND: tl.constexpr):
    """What is compared with the limits below: u, or |u| where it tells whether a smooth unit is saturated."""
    return tl.where(is_odd, tl.abs(u), u) if KIND == "smooth" else u


@triton.jit(do_not_specialize=UNSPECIALIZED)
def cortex_forward_one_lane_kernel(
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
    KIND: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ADAPTATION_STRENGTH: tl.constexpr,
    ADAPTATION_DECAY: tl.constexpr,
    HAS_START: tl.constexpr,
    SAVE: tl.constexpr,
):
    first_neuron = tl.program_id(0).to(tl.int64) * C
    lane = tl.program_id(1).to(tl.int64)
    row, q = thread_rows(C)
    always = row >= 0
    state_offset = lane * D + first_neuron

    operand: tl.constexpr = tl.float32 if drive.dtype.element_ty == tl.float32 else tl.float16
    w00, w10, w01, w11 = load_weight_quarters(lateral_weight + first_neuron * C, 1, C, C)
    w00 = w00.to(operand)
    w10 = w10.to(operand)
    w01 = w01.to(operand)
    w11 = w11.to(operand)
    alpha = load_quarters(decay + first_neuron, row, always, C)
    gain = tl.sqrt(1.0 - alpha)
    reset = alpha * THRESHOLD
    v = load_quarters(initial_voltage + state_offset, row, always, C)
    a = load_quarters(initial_adaptation + state_offset, row, always, C)
    s = load_quarters(initial_spikes + state_offset, row, always, C)

    # Threads with an odd q store spikes and count saturated neurons, the others u and those that fire: all of halves i.
    is_odd = q % 2 == 1
    upper = q >= 2
    own_row = row + q // 2 * (C // 2)
    stored = tl.where(is_odd, spikes, excess) + lane * T * D + first_neuron + own_row
    is_stored = is_odd | SAVE
    # Saturated is u >= CEILING, which is u > the float32 before it; a binary neuron is where it fires.
    highest: tl.constexpr = CEILING if KIND == "graded" else SMOOTH_LIMIT if KIND == "smooth" else 0.0
    limit = tl.where(is_odd, highest * (1.0 - 0.5**24), 0.0)
    first_count = tl.zeros((C,), tl.int32)
    second_count = tl.zeros((C,), tl.int32)

    drive += lane * drive_stride_b + first_neuron
    x0 = load_quarters(drive, row, T > 0, C)
    drive += drive_stride_t
    x1 = load_quarters(drive, row, T > 1, C)
    drive += drive_stride_t
    x2 = load_quarters(drive, row, T > 2, C)
    if HAS_START:
        document_start += lane * start_stride_b
        f0 = tl.load(document_start, mask=T > 0, other=0)
        document_start += start_stride_t
        f1 = tl.load(document_start, mask=T > 1, other=0)
        document_start += start_stride_t
        f2 = tl.load(document_start, mask=T > 2, other=0)
    t = 0
    while t < T:
        if HAS_START:
            kept = f0 == 0
            v = tl.where(kept, v, 0.0)
            a = tl.where(kept, a, 0.0)
            s = tl.where(kept, s, 0.0)
            f0 = f1
            f1 = f2
            document_start += start_stride_t
            f2 = tl.load(document_start, mask=t + 3 < T, other=0)
        received = product(w00, w10, w01, w11, s.to(operand), C)
        x = x0.to(tl.float32)
        x0 = x1
        x1 = x2
        drive += drive_stride_t
        x2 = load_quarters(drive, row, t + 3 < T, C)
        pre = alpha * v - reset * s + gain * x
        a = ADAPTATION_DECAY * a + (1.0 - ADAPTATION_DECAY) * s
        v = pre + (1.0 - alpha) * received
        u = v - THRESHOLD - ADAPTATION_STRENGTH * a
        s = spike(u, KIND)
        first, second = halves(u, upper)
        first_count += (counted(first, is_odd, KIND) > limit).to(tl.int32)
        second_count += (counted(second, is_odd, KIND) > limit).to(tl.int32)
        first = first.to(spikes.dtype.element_ty)
        second = second.to(spikes.dtype.element_ty)
        first_spike = spike(first.to(tl.float32), KIND).to(spikes.dtype.element_ty)
        second_spike = spike(second.to(tl.float32), KIND).to(spikes.dtype.element_ty)
        tl.store(stored, tl.where(is_odd, first_spike, first), mask=is_stored)
        tl.store(stored + 8, tl.where(is_odd, second_spike, second), mask=is_stored)
        stored += D
        t += 1

    own = row + q % 2 * (C // 2) + q // 2 * 8
    tl.store(final_voltage + state_offset + own, own_quarter(v, q))
    tl.store(final_adaptation + state_offset + own, own_quarter(a, q))
    tl.store(final_spikes + state_offset + own, own_quarter(s, q))
    counts += lane * 2 * D + first_neuron
    count_offset = q % 2 * D + own_row
    tl.store(counts + count_offset, first_count)
    tl.store(counts + count_offset + 8, second_count)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def cortex_backward_one_lane_kernel(
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
    KIND: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ADAPTATION_STRENGTH: tl.constexpr,
    ADAPTATION_DECAY: tl.constexpr,
    HAS_START: tl.constexpr,
):
    first_neuron = tl.program_id(0).to(tl.int64) * C
    lane = tl.program_id(1).to(tl.int64)
    row, q = thread_rows(C)
    own = row + q % 2 * (C // 2) + q // 2 * 8
    always = row >= 0
    state_offset = lane * D + first_neuron
    last = (T - 1).to(tl.int64)

    operand: tl.constexpr = grad_drive.dtype.element_ty
    w00, w10, w01, w11 = load_weight_quarters(lateral_weight + first_neuron * C, C, 1, C)  # transposed
    k = tl.arange(0, C // 4)
    decays = decay + first_neuron + (k // 8 * 16 + k % 8)[None, :]
    w00 = (w00.to(tl.float32) * tl.sqrt(1.0 - tl.load(decays))).to(operand)
    w10 = (w10.to(tl.float32) * tl.sqrt(1.0 - tl.load(decays + C // 2))).to(operand)
    w01 = (w01.to(tl.float32) * tl.sqrt(1.0 - tl.load(decays + 8))).to(operand)
    w11 = (w11.to(tl.float32) * tl.sqrt(1.0 - tl.load(decays + (C // 2 + 8)))).to(operand)
    # One load, not four joined: Triton takes a join among what makes a factor for packed narrow numbers, and moves it.
    half = tl.arange(0, 2)
    alpha = tl.load(
        decay + first_neuron + row[:, None, None] + (half * (C // 2))[None, :, None] + (half * 8)[None, None]
    )
    gain = tl.sqrt(1.0 - alpha)
    reset = alpha * THRESHOLD

    # As in `cortex_backward_kernel`: gradients to what the next token receives, and the voltage's part of alpha's.
    next_v = load_quarters(grad_final_voltage + state_offset, row, always, C)
    next_a = load_quarters(grad_final_adaptation + state_offset, row, always, C)
    next_s = load_quarters(grad_final_spikes + state_offset, row, always, C)
    leaked = tl.zeros((C, 2, 2), tl.float32)
    to_voltage = tl.zeros((C, 2, 2), tl.float32)
    to_adaptation = tl.zeros((C, 2, 2), tl.float32)

    excess += (lane * T + last) * D + first_neuron
    grad_spikes += lane * grad_stride_b + last * grad_stride_t + first_neuron
    stored = grad_drive + lane * grad_drive_stride_b + last * grad_drive_stride_t + first_neuron + own
    u0 = load_quarters(excess, row, always, C)
    g0 = load_quarters(grad_spikes, row, always, C)
    excess -= D
    grad_spikes -= grad_stride_t
    u1 = load_quarters(excess, row, T > 1, C)
    g1 = load_quarters(grad_spikes, row, T > 1, C)
    excess -= D
    grad_spikes -= grad_stride_t
    u2 = load_quarters(excess, row, T > 2, C)
    g2 = load_quarters(grad_spikes, row, T > 2, C)
    if HAS_START:
        document_start += lane * start_stride_b + last * start_stride_t
        f0 = tl.load(document_start)
        document_start -= start_stride_t
        f1 = tl.load(document_start, mask=T > 1, other=0)
        document_start -= start_stride_t
        f2 = tl.load(document_start, mask=T > 2, other=0)
    slope = spike_derivative(u0.to(tl.float32), KIND)
    t = 0
    while t < T:
        u = u0.to(tl.float32)
        ds = g0.to(tl.float32) + next_s
        u0 = u1
        u1 = u2
        g0 = g1
        g1 = g2
        excess -= D
        grad_spikes -= grad_stride_t
        u2 = load_quarters(excess, row, t + 3 < T, C)
        g2 = load_quarters(grad_spikes, row, t + 3 < T, C)

        du = ds * slope
        dv = next_v + du
        da = next_a - ADAPTATION_STRENGTH * du
        dx = (gain * dv).to(operand)
        received = product(w00, w10, w01, w11, dx, C)
        slope = spike_derivative(u0.to(tl.float32), KIND)  # for the next step, while this one's product is awaited
        next_v = alpha * dv
        next_a = ADAPTATION_DECAY * da
        next_s = (1.0 - ADAPTATION_DECAY) * da - reset * dv + received

        s = spike(u, KIND)
        leaked += to_voltage * (u + THRESHOLD - THRESHOLD * s)
        leaked += (ADAPTATION_STRENGTH * (1.0 - ADAPTATION_DECAY)) * (to_adaptation * s)
        to_adaptation = to_voltage + ADAPTATION_DECAY * to_adaptation
        to_voltage = dv
        if HAS_START:
            kept = f0 == 0
            next_v = tl.where(kept, next_v, 0.0)
            next_a = tl.where(kept, next_a, 0.0)
            next_s = tl.where(kept, next_s, 0.0)
            to_voltage = tl.where(kept, to_voltage, 0.0)
            to_adaptation = tl.where(kept, to_adaptation, 0.0)
            f0 = f1
            f1 = f2
            document_start -= start_stride_t
            f2 = tl.load(document_start, mask=t + 3 < T, other=0)
        tl.store(stored, own_quarter(dx, q))
        stored -= grad_drive_stride_t
        t += 1

    tl.store(grad_initial_voltage + state_offset + own, own_quarter(next_v, q))
    tl.store(grad_initial_adaptation + state_offset + own, own_quarter(next_a, q))
    tl.store(grad_initial_spikes + state_offset + own, own_quarter(next_s, q))
    v = load_quarters(initial_voltage + state_offset, row, always, C)
    a = load_quarters(initial_adaptation + state_offset, row, always, C)
    s = load_quarters(initial_spikes + state_offset, row, always, C)
    leaked += to_voltage * (v - THRESHOLD * s)
    leaked += ADAPTATION_STRENGTH * to_adaptation * (ADAPTATION_DECAY * a + (1.0 - ADAPTATION_DECAY) * s)
    tl.store(leak_sums + lane * D + first_neuron + own, own_quarter(leaked, q))
