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
def append(items, item):
    """A tuple and one more."""
    return items + (item,)  # noqa: RUF005, a compiled function cannot unpack


@triton.jit
def value_of(packet):
    return packet.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def send(p_packets, value, epoch, mask):
    """Store values with the number of their token."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(p_packets, bits | (epoch.to(tl.int64) << 32), mask=mask)


@triton.jit
def send_here(p_packets, value, epoch, mask, SINGLE: tl.constexpr):
    """As `send`, from the threads that hold the values, all of them: a store of Triton's would first hand the values
    round through shared memory."""
    if SINGLE:
        send(p_packets, value, epoch, mask)
    else:
        bits, epochs = value.to(tl.int32, bitcast=True), tl.zeros(value.shape, tl.int32) + epoch
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b64 d;
            setp.ne.u32 p, $4, 0;
            mov.b64 d, {$2, $3};
            @p st.relaxed.gpu.global.b64 [$1], d;
            mov.u32 $0, 0; }""",
            "=r,l,r,r,r", [p_packets, bits, epochs, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def store_here(p, value, mask, SINGLE: tl.constexpr):
    """Store float32 from the threads that hold them; see `send_here`."""
    if SINGLE:
        tl.store(p, value, mask=mask)
    else:
        tl.inline_asm_elementwise(
            """{ .reg .pred p;
            setp.ne.u32 p, $3, 0;
            @p st.relaxed.gpu.global.b32 [$1], $2;
            mov.u32 $0, 0; }""",
            "=r,l,r,r", [p, value.to(tl.int32, bitcast=True), mask.to(tl.int32)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def prefetch(p, SINGLE: tl.constexpr):
    """Ask for the cache lines at p to come to L2."""
    if not SINGLE:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.constexpr_function
def poll_assembly(num_tensors, pack):
    """Assembly that polls `pack` packets of each of some tensors until all bear the number in the last operand."""
    count = num_tensors * pack
    lines = [f"{{ .reg .pred p; .reg .u32 e<{count}>; .reg .b64 d<{count}>;", "POLL:"]
    lines += [f"ld.relaxed.gpu.global.b64 d{i}, [${count + i}];" for i in range(count)]
    lines += [f"mov.b64 {{${i}, e{i}}}, d{i};" for i in range(count)]
    lines += ["setp.ne.u32 p, e0, $" + str(2 * count) + ";"]
    lines += [f"setp.ne.or.u32 p, e{i}, ${2 * count}, p;" for i in range(1, count)]
    return "\n".join([*lines, "@p bra POLL; }"])


@triton.constexpr_function
def poll_constraints(num_tensors, pack):
    return ",".join(["=&r"] * (num_tensors * pack) + ["l"] * (num_tensors * pack) + ["r"] * pack)


@triton.jit
def receive(p_packets, epoch, PACK: tl.constexpr, SINGLE: tl.constexpr):
    """Values at a tuple of pointers (of one shape), once all of a thread's bear the number `epoch`. PACK of each are
    polled at once, all tensors together."""
    COUNT: tl.constexpr = len(p_packets)
    values = ()
    if SINGLE:
        for i in tl.static_range(COUNT):
            values = append(values, value_of(tl.load(p_packets[i])))
    else:
        epochs = tl.zeros(p_packets[0].shape, tl.int32) + epoch
        bits = (epochs,) * COUNT
        # A loop of one turn: the compiler would repeat the polling in each layout that its values are wanted in, but
        # not a loop.
        again = epoch
        while again > 0:
            bits = tl.inline_asm_elementwise(
                poll_assembly(COUNT, PACK), poll_constraints(COUNT, PACK), append(p_packets, epochs),
                dtype=(tl.int32,) * COUNT, is_pure=False, pack=PACK,
            )  # fmt: skip
            again = epoch * 0
        for i in tl.static_range(COUNT):
            values = append(values, bits[i].to(tl.float32, bitcast=True))
    return values


@triton.constexpr_function
def poll_pairs_assembly(pairs, singles):
    """Assembly that polls pairs of packets and single ones until all bear the number in the last operand; the first
    values of all pairs come first, then the second ones, then the single ones."""
    count = 2 * pairs + singles
    pointer, epoch = count, count + pairs + singles
    lines = [f"{{ .reg .pred p; .reg .u32 e<{count}>; .reg .b64 d<{count}>;", "POLL:"]
    lines += [f"ld.relaxed.gpu.global.v2.b64 {{d{i}, d{pairs + i}}}, [${pointer + i}];" for i in range(pairs)]
    lines += [f"ld.relaxed.gpu.global.b64 d{2 * pairs + i}, [${pointer + pairs + i}];" for i in range(singles)]
    lines += [f"mov.b64 {{${i}, e{i}}}, d{i};" for i in range(count)]
    lines += [f"setp.ne.u32 p, e0, ${epoch};"]
    lines += [f"setp.ne.or.u32 p, e{i}, ${epoch}, p;" for i in range(1, count)]
    return "\n".join([*lines, "@p bra POLL; }"])


@triton.constexpr_function
def poll_pairs_constraints(pairs, singles):
    return ",".join(["=&r"] * (2 * pairs + singles) + ["l"] * (pairs + singles) + ["r"])


@triton.jit
def receive_pairs(p_packets, epoch, PAIRS: tl.constexpr):
    """As `receive`: values at the first PAIRS pointers, at multiples of 16 bytes, then those behind them, then those at
    the other pointers."""
    SINGLES: tl.constexpr = len(p_packets) - PAIRS
    epochs = tl.zeros(p_packets[0].shape, tl.int32) + epoch
    bits = (epochs,) * (2 * PAIRS + SINGLES)
    again = epoch
    while again > 0:
        bits = tl.inline_asm_elementwise(
            poll_pairs_assembly(PAIRS, SINGLES), poll_pairs_constraints(PAIRS, SINGLES),
            append(p_packets, epochs), dtype=(tl.int32,) * (2 * PAIRS + SINGLES), is_pure=False, pack=1,
        )  # fmt: skip
        again = epoch * 0
    values = ()
    for i in tl.static_range(2 * PAIRS + SINGLES):
        values = append(values, bits[i].to(tl.float32, bitcast=True))
    return values


@triton.constexpr_function
def room_channels(D, M, CH, U):
    """Channels that the room holds: a phase's, in whole turns."""
    return -(-max(D, M) // (U * CH)) * U * CH


@triton.constexpr_function
def room_bytes(D, M, CH, U, PART):
    """Bytes of the room: channels, 16 bytes more after each 128, and sums of PART channels' squares."""
    return -(-(room_channels(D, M, CH, U) * 9 // 2 + room_channels(D, 1, CH, U) // PART * 4) // 1024) * 1024


@triton.constexpr_function
def room_assembly(num_bytes):
    return f"{{ .shared .align 1024 .b8 room[{num_bytes}]; mov.u32 $0, room; }}"


@triton.jit
def shared_room(BYTES: tl.constexpr, SINGLE: tl.constexpr):
    """Shared memory beside the compiler's own, through which a phase's activations get from the threads that polled
    them to the threads that multiply by them. A change of layout would do that with two barriers for each tensor."""
    room = tl.program_id(0)
    if not SINGLE:
        room = tl.inline_asm_elementwise(
            room_assembly(BYTES), "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )
    return room


@triton.jit
def room_place(channel):
    """Byte of a channel in the room. 16 bytes are left after each 128, so that threads of a quarter warp, which read 16
    bytes each of every 32, meet all banks."""
    return channel * 4 + (channel >> 5) * 16


@triton.jit
def put_pair(place, first, second):
    tl.inline_asm_elementwise(
        "st.shared.v2.f32 [$1], {$2, $3}; mov.u32 $0, 0;", "=r,r,f,f", [place, first, second], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def put(place, value):
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.u32 $0, 0;", "=r,r,f", [place, value], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def get(place):
    return tl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [place], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def all_put(room):
    """The room once all threads have put their values there. (Loads from it hang on this value and so stay behind.)"""
    return tl.inline_asm_elementwise(
        "bar.sync 0; mov.u32 $0, $1;", "=r,r", [room], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def still_put(room):
    """The room, where earlier turns' values are."""
    return tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [room], dtype=tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def blocks_left(K, CH, start, most):
    """How many of the next `most` blocks of CH channels, from block `start`, begin within K."""
    return max(0, min(most, -(-K // CH) - start))


@triton.jit
def put_zeros(room, CH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    o_k = tl.arange(0, CH // 2) * 2
    for i in tl.static_range(FIRST, LAST):
        put_pair(room + room_place(i * CH + o_k), o_k.to(tl.float32) * 0.0, o_k.to(tl.float32) * 0.0)


@triton.jit
def put_sums(place, x, PART: tl.constexpr):
    """Put the sums of x over each PART / 2 of its elements, from `place` on. (Each thread that adds stores the sum: one
    store a sum would change the layout, with barriers.)"""
    NUM: tl.constexpr = 2 * x.shape[0] // PART
    part = tl.sum(tl.reshape(x, [NUM, PART // 2]), 1)
    part = tl.reshape(tl.broadcast_to(part[:, None], [NUM, PART // 2]), [x.shape[0]])
    put(place + tl.arange(0, x.shape[0]) // (PART // 2) * 4, part)


@triton.constexpr_function
def sum_assembly(count):
    lines = ["{ .reg .f32 t; mov.f32 $0, 0f00000000;"]
    lines += [f"ld.shared.f32 t, [$1 + {4 * i}]; add.f32 $0, $0, t;" for i in range(count)]
    return "\n".join([*lines, "}"])


@triton.jit
def get_sum(place, COUNT: tl.constexpr):
    """The sum of COUNT values, to every thread."""
    return tl.inline_asm_elementwise(
        sum_assembly(COUNT), "=&f,r", [place], dtype=tl.float32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def gather_blocks(room, p_packets, epoch, K: tl.constexpr, CH: tl.constexpr, START: tl.constexpr, COUNT: tl.constexpr):
    """Put COUNT blocks of CH channels into the room, and return their squares `[CH // 2]`, of two channels each."""
    o_k = tl.arange(0, CH // 2) * 2
    p = ()
    for i in tl.static_range(COUNT):
        p = append(p, p_packets + tl.minimum((START + i) * CH + o_k, K - 2))
    values = receive_pairs(p, epoch, COUNT)
    squares = tl.zeros([CH // 2], tl.float32)
    for i in tl.static_range(COUNT):
        o_c = (START + i) * CH + o_k
        first, second = tl.where(o_c < K, values[i], 0.0), tl.where(o_c < K, values[COUNT + i], 0.0)
        put_pair(room + room_place(o_c), first, second)
        squares += first * first + second * second
    return squares


@triton.jit
def gather_channels(
    room, sums, p_packets, epoch, K: tl.constexpr, SQUARE: tl.constexpr, PART: tl.constexpr, CH: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    """Put all K channels into the room, and zeros behind them to the end of a turn. Returns the room, once all is
    there, and with SQUARE the sum of their squares."""
    BLOCKS: tl.constexpr = (K + CH - 1) // CH
    squares = tl.zeros([CH // 2], tl.float32)
    for start in tl.static_range(0, BLOCKS, 8):
        squares += gather_blocks(room, p_packets, epoch, K, CH, start, blocks_left(K, CH, start, 8))
    put_zeros(room, CH, BLOCKS, room_channels(K, 1, CH, U) // CH)
    total = tl.full([], 0.0, tl.float32)
    if SQUARE:
        put_sums(sums, squares, PART)
    ready = all_put(room)
    if SQUARE:
        total = get_sum(sums, CH // PART)
    return ready, total


@triton.jit
def gather_normed_blocks(
    room, sums, p_packets, p_group, p_gate, epoch, gated, D: tl.constexpr, GO: tl.constexpr, WIDTH: tl.constexpr,
    PART: tl.constexpr, EPS: tl.constexpr, CH: tl.constexpr, START: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    o_k = tl.arange(0, CH // 2) * 2
    PARTS: tl.constexpr = WIDTH // PART
    p, p_one = (), ()
    for i in tl.static_range(2 * COUNT):
        o_d = tl.minimum((START + i % COUNT) * CH + o_k, D - 2)
        p = append(p, (p_packets if i < COUNT else p_group) + o_d)
        if GO:  # noqa: SIM102, one is decided when compiled
            if i < COUNT:
                p_one = append(p_one, tl.where(gated, p_gate + o_d // WIDTH, p_packets + o_d))
    values = receive_pairs(p + p_one, epoch, 2 * COUNT)
    for i in tl.static_range(COUNT):
        square = values[COUNT + i] * values[COUNT + i] + values[3 * COUNT + i] * values[3 * COUNT + i]
        put_sums(sums + (START + i) * (CH // PART * 4), square, PART)
    ready = all_put(sums)
    for i in tl.static_range(COUNT):
        o_c = (START + i) * CH + o_k
        place = ready + o_c // WIDTH * (PARTS * 4)
        total = get(place)
        for j in tl.static_range(1, PARTS):
            total += get(place + 4 * j)
        factor = tl.rsqrt(total / WIDTH + EPS)
        if GO:
            factor = tl.where(gated, factor * values[4 * COUNT + i], factor)
        factor = tl.where(o_c < D, factor, 0.0)
        put_pair(room + room_place(o_c), values[i] * factor, values[2 * COUNT + i] * factor)


@triton.jit
def gather_normed(
    room, sums, p_packets, p_group, p_gate, epoch, gated, D: tl.constexpr, GO: tl.constexpr, WIDTH: tl.constexpr,
    PART: tl.constexpr, EPS: tl.constexpr, CH: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Put `p_packets` `[D]`, times the RMS factor of its group of WIDTH channels in `p_group` `[D]` and, if `gated`,
    its gate, into the room. Squares are summed over PART channels within a warp, and these sums put at `sums`."""
    BLOCKS: tl.constexpr = (D + CH - 1) // CH
    for start in tl.static_range(0, BLOCKS, 4):
        gather_normed_blocks(
            room, sums, p_packets, p_group, p_gate, epoch, gated,
            D, GO, WIDTH, PART, EPS, CH, start, blocks_left(D, CH, start, 4),
        )  # fmt: skip
    put_zeros(room, CH, BLOCKS, room_channels(D, 1, CH, U) // CH)
    return all_put(room)


@triton.jit
def room_channels_of(room, first, NH: tl.constexpr, NI: tl.constexpr, KS: tl.constexpr, U: tl.constexpr):
    """Channels `first` to first + U * CH of the room as U tensors `[NH, 1, NI, KS]`, in whatever layout is wanted."""
    o_h, o_i = tl.arange(0, NH)[:, None, None, None], tl.arange(0, NI)[None, None, :, None]
    o_k = (o_h * NI + o_i) * KS + tl.arange(0, KS // 4)[None, None, None, :] * 4
    out = ()
    for u in tl.static_range(U):
        if U * NH * NI * KS % 32 == 0:  # then the gaps before `first` are a turn's, times a number
            place = room + room_place(first) + room_place(u * NH * NI * KS + o_k)
        else:
            place = room + room_place(first + u * NH * NI * KS + o_k)
        a, b, c, d = tl.inline_asm_elementwise(
            "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r", [place], dtype=(tl.float32,) * 4, is_pure=True,
            pack=1,
        )  # fmt: skip
        out = append(out, tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [NH, 1, NI, KS]))
    return out


@triton.jit
def load_channels(
    p_packets, first, K, NH: tl.constexpr, NI: tl.constexpr, KS: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The same straight from packets that are there, as with a single program."""
    o_h, o_i = tl.arange(0, NH)[:, None, None, None], tl.arange(0, NI)[None, None, :, None]
    o_k = (o_h * NI + o_i) * KS + tl.arange(0, KS)[None, None, None, :]
    out = ()
    for u in tl.static_range(U):
        o_c = first + u * NH * NI * KS + o_k
        out = append(out, tl.where(o_c < K, value_of(tl.load(p_packets + tl.minimum(o_c, K - 1))), 0.0))
    return out


@triton.jit
def load_normed(
    p_packets, p_group, p_gate, first, gated, D: tl.constexpr, GO: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr,
    NH: tl.constexpr, NI: tl.constexpr, KS: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The same with what `gather_normed` puts into the room."""
    CH: tl.constexpr = NH * NI * KS
    GROUPS: tl.constexpr = CH // WIDTH
    out = ()
    for u in tl.static_range(U):
        o_c = first + u * CH + tl.arange(0, CH)
        group = value_of(tl.load(p_group + tl.minimum(o_c, D - 1)))
        factor = tl.rsqrt(tl.sum(tl.reshape(group * group, [GROUPS, WIDTH]), 1) / WIDTH + EPS)
        if GO:  # noqa: SIM102, one is decided when compiled
            if gated:
                o_g = tl.minimum(first // WIDTH + u * GROUPS + tl.arange(0, GROUPS), D // WIDTH - 1)
                factor *= value_of(tl.load(p_gate + o_g))
        factor = tl.reshape(tl.broadcast_to(factor[:, None], [GROUPS, WIDTH]), [CH])
        value = tl.where(o_c < D, value_of(tl.load(p_packets + tl.minimum(o_c, D - 1))) * factor, 0.0)
        out = append(out, tl.reshape(value, [NH, 1, NI, KS]))
    return out


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
