"""How a phase's activations get from packets to the products: through a room in shared memory.

Threads poll packets in the order in which they lie, and multiply in that of the weights; a change of layout by the
compiler would take two barriers for each tensor, the room takes one for all.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.asking import together
from kernels.generate.packets import append, receive_pairs, value_of


@triton.constexpr_function
def room_channels(D, M, TURN):
    """Channels that the room holds: a phase's, in whole turns of TURN."""
    return -(-max(D, M) // TURN) * TURN


@triton.constexpr_function
def room_bytes(D, M, TURN, PART):
    """Bytes of the room: channels, 16 bytes more after each 128, and sums of PART channels' squares."""
    return -(-(room_channels(D, M, TURN) * 9 // 2 + room_channels(D, 1, TURN) // PART * 4) // 1024) * 1024


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
def get(place, PURE: tl.constexpr = False):
    """What has been put at a place that hangs on `together` or `still_put`; with PURE in whatever layout is wanted."""
    return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [place], dtype=tl.float32, is_pure=PURE, pack=1)


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
def gather_blocks(
    room, p_packets, epoch, states, K: tl.constexpr, CH: tl.constexpr, START: tl.constexpr, COUNT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Put COUNT blocks of CH channels into the room, and return their squares `[CH // 2]`, of two channels each."""
    o_k = tl.arange(0, CH // 2) * 2
    p = ()
    for i in tl.static_range(COUNT):
        p = append(p, p_packets + tl.minimum((START + i) * CH + o_k, K - 2))
    values = receive_pairs(p, epoch, states, COUNT)
    squares = tl.zeros([CH // 2], tl.float32)
    for i in tl.static_range(COUNT):
        o_c = (START + i) * CH + o_k
        first, second = tl.where(o_c < K, values[i], 0.0), tl.where(o_c < K, values[COUNT + i], 0.0)
        put_pair(room + room_place(o_c), first * UNIT, second * UNIT)
        squares += first * first + second * second
    return squares


@triton.jit
def gather_channels(
    room, sums, p_packets, epoch, states, K: tl.constexpr, SQUARE: tl.constexpr, PART: tl.constexpr, CH: tl.constexpr,
    TURN: tl.constexpr, UNIT: tl.constexpr, ASKS: tl.constexpr,
):  # fmt: skip
    """Put all K channels, times UNIT, into the room, and zeros behind them to the end of a turn. Returns the room, once
    all is there, and with SQUARE the sum of the channels' squares."""
    BLOCKS: tl.constexpr = (K + CH - 1) // CH
    squares = tl.zeros([CH // 2], tl.float32)
    for start in tl.static_range(0, BLOCKS, 8):
        squares += gather_blocks(
            room, p_packets, epoch, states, K, CH, start, blocks_left(K, CH, start, 8), UNIT
        )  # fmt: skip
    put_zeros(room, CH, BLOCKS, room_channels(K, 1, TURN) // CH)
    total = tl.full([], 0.0, tl.float32)
    if SQUARE:
        put_sums(sums, squares, PART)
    ready = together(room, states, ASKS)
    if SQUARE:
        total = get_sum(sums, CH // PART)
    return ready, total


@triton.jit
def gather_normed_blocks(
    room, sums, p_packets, p_group, p_gate, epoch, states, gated, D: tl.constexpr, GO: tl.constexpr,
    WIDTH: tl.constexpr, PART: tl.constexpr, EPS: tl.constexpr, CH: tl.constexpr, START: tl.constexpr,
    COUNT: tl.constexpr, UNIT: tl.constexpr, ASKS: tl.constexpr,
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
    values = receive_pairs(p + p_one, epoch, states, 2 * COUNT)
    for i in tl.static_range(COUNT):
        square = values[COUNT + i] * values[COUNT + i] + values[3 * COUNT + i] * values[3 * COUNT + i]
        put_sums(sums + (START + i) * (CH // PART * 4), square, PART)
    ready = together(sums, states, ASKS)
    for i in tl.static_range(COUNT):
        o_c = (START + i) * CH + o_k
        place = ready + o_c // WIDTH * (PARTS * 4)
        total = get(place)
        for j in tl.static_range(1, PARTS):
            total += get(place + 4 * j)
        factor = tl.rsqrt(total / WIDTH + EPS)
        if GO:
            factor = tl.where(gated, factor * values[4 * COUNT + i], factor)
        factor = tl.where(o_c < D, factor * UNIT, 0.0)
        put_pair(room + room_place(o_c), values[i] * factor, values[2 * COUNT + i] * factor)


@triton.jit
def gather_normed(
    room, sums, p_packets, p_group, p_gate, epoch, states, gated, D: tl.constexpr, GO: tl.constexpr,
    WIDTH: tl.constexpr, PART: tl.constexpr, EPS: tl.constexpr, CH: tl.constexpr, TURN: tl.constexpr,
    UNIT: tl.constexpr, ASKS: tl.constexpr,
):  # fmt: skip
    """Put `p_packets` `[D]`, times the RMS factor of its group of WIDTH channels in `p_group` `[D]`, UNIT and, if
    `gated`, its gate, into the room. Squares are summed over PART channels within a warp, and these sums are put at
    `sums`."""
    BLOCKS: tl.constexpr = (D + CH - 1) // CH
    for start in tl.static_range(0, BLOCKS, 4):
        gather_normed_blocks(
            room, sums, p_packets, p_group, p_gate, epoch, states, gated,
            D, GO, WIDTH, PART, EPS, CH, start, blocks_left(D, CH, start, 4), UNIT, ASKS,
        )  # fmt: skip
    put_zeros(room, CH, BLOCKS, room_channels(D, 1, TURN) // CH)
    return together(room, states, ASKS)


@triton.constexpr_function
def values_constraints(count):
    return ",".join(["=&f"] * count + ["r"])


@triton.constexpr_function
def values_assembly(granules, bits):
    vector = 128 // bits
    lines = []
    for i in range(granules * vector // 4):
        channel = i // (vector // 4) * 32 * vector  # of a granule; then a thread's next 16 bytes
        place = channel * 4 + channel // 32 * 16 + i % (vector // 4) * 16
        values = ", ".join(f"${4 * i + k}" for k in range(4))
        lines.append(f"ld.shared.v4.f32 {{{values}}}, [${granules * vector} + {place}];")
    return "\n".join(lines)


@triton.jit
def room_values(room, first, thread, GRANULES: tl.constexpr, BITS: tl.constexpr):
    """The activations that each thread multiplies by in a turn, from channel `first` of the room on: a tuple of `[T]`,
    as many of each granule as a thread has weights of BITS bits in 16 bytes."""
    COUNT: tl.constexpr = GRANULES * (128 // BITS)
    place = room + room_place(first) + room_place((thread & 31) * (128 // BITS))
    return tl.inline_asm_elementwise(
        values_assembly(GRANULES, BITS), values_constraints(COUNT), [place], dtype=(tl.float32,) * COUNT,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_channels(p_packets, first, K, G: tl.constexpr, GRANULES: tl.constexpr):
    """With a single program, a turn's activations straight from packets that are there: a tuple of `[G]`."""
    out = ()
    for i in tl.static_range(GRANULES):
        o_c = first + i * G + tl.arange(0, G)
        out = append(out, tl.where(o_c < K, value_of(tl.load(p_packets + tl.minimum(o_c, K - 1))), 0.0))
    return out


@triton.jit
def load_normed(
    p_packets, p_group, p_gate, first, gated, D: tl.constexpr, GO: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr,
    G: tl.constexpr, GRANULES: tl.constexpr,
):  # fmt: skip
    """The same with what `gather_normed` puts into the room."""
    GROUPS: tl.constexpr = G // WIDTH
    out = ()
    for i in tl.static_range(GRANULES):
        o_c = first + i * G + tl.arange(0, G)
        group = value_of(tl.load(p_group + tl.minimum(o_c, D - 1)))
        factor = tl.rsqrt(tl.sum(tl.reshape(group * group, [GROUPS, WIDTH]), 1) / WIDTH + EPS)
        if GO:  # noqa: SIM102, one is decided when compiled
            if gated:
                o_g = tl.minimum(first // WIDTH + i * GROUPS + tl.arange(0, GROUPS), D // WIDTH - 1)
                factor *= value_of(tl.load(p_gate + o_g))
        factor = tl.reshape(tl.broadcast_to(factor[:, None], [GROUPS, WIDTH]), [G])
        value = tl.where(o_c < D, value_of(tl.load(p_packets + tl.minimum(o_c, D - 1))) * factor, 0.0)
        out = append(out, value)
    return out
