"""Weights on their way to the products of one lane: for each warp a ring of slots in shared memory.

A warp asks for its rows of a portion by one bulk copy, waits for them at a barrier of its own, and reads them; the slot
is then free for a later portion, which is asked for when it is time (`kernels.generate.asking`). No warp waits for
another: while one waits for shared memory or for its sums, the others of its scheduler multiply. (The compiler's own
pipeline fetches a tile for the whole block and takes five barriers and a fence of all threads each time.)

What `[T]` is has an element for each thread: T / R of them, neighbours in a warp, share a row. For this the compiler's
layout of a one-dimensional tensor of as many elements as there are threads is taken: element i is thread i's.

The slots lie behind what the compiler takes of shared memory for itself (`kernels.launch.reserve_shared`).
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.activations import room_place
from kernels.generate.asking import GRANULE_BYTES, PIECE_BYTES, ROWS_OF_WARP, STATE_BYTES, state_lines, wait_lines
from kernels.generate.packets import append
from kernels.generate.weight_bytes import EXCESS_OF_BYTE


@triton.constexpr_function
def all_states_bytes(num_warps):
    """Bytes of what each warp asks by, and of a barrier of all."""
    return num_warps * STATE_BYTES + 16


@triton.constexpr_function
def ring_bytes(granules, slots, num_warps):
    """Bytes of the ring of a block: its slots, a barrier for each, and `all_states_bytes`."""
    return num_warps * slots * (granules * PIECE_BYTES + 8) + all_states_bytes(num_warps)


@triton.constexpr_function
def start_assembly(granules, slots, num_warps, pace):
    bytes_of_warp = slots * granules * PIECE_BYTES
    states = ring_bytes(granules, slots, num_warps) - all_states_bytes(num_warps)
    return f"""{{ .reg .pred p, q; .reg .b32 end, at, warp, lane, barriers, none, value, block; .reg .b64 word, from;
        mov.u32 at, global_smem;
        add.u32 at, at, $3;
        and.b32 lane, $2, 31;
        shr.u32 warp, $2, 5;
        mad.lo.u32 barriers, warp, {8 * slots}, at;
        add.u32 barriers, barriers, {num_warps * bytes_of_warp};
        mad.lo.u32 at, warp, {bytes_of_warp}, at;
        mad.lo.u32 at, lane, 16, at;
        mov.u32 $0, at;
        mov.u32 $1, barriers;
        add.u32 end, at, {bytes_of_warp};
        CLEAR:
        st.shared.v4.b32 [at], {{0, 0, 0, 0}};
        add.u32 at, at, 512;
        setp.lt.u32 p, at, end;
        @p bra CLEAR;
        setp.eq.u32 q, lane, 0;
        add.u32 end, barriers, {8 * slots};
        START:
        @q mbarrier.init.shared.b64 [barriers], 1;
        add.u32 barriers, barriers, 8;
        setp.lt.u32 p, barriers, end;
        @p bra START;
        fence.proxy.async.shared::cta;
        mov.u32 at, global_smem;
        add.u32 at, at, $3;
        add.u32 at, at, {states};
        mad.lo.u32 end, warp, {STATE_BYTES}, at;
        add.u32 at, at, {num_warps * STATE_BYTES};
        mov.u32 block, at;
        setp.eq.u32 p, $2, 0;
        @p mbarrier.init.shared.b64 [block], {num_warps};
        add.u32 at, at, 16;
        mov.u32 none, 0;
        mov.u32 value, {slots};
        @q st.shared.v4.b32 [end], {{none, $8, none, value}};
        @q st.shared.v2.b32 [end + 56], {{$7, value}};
        mov.u32 value, {granules * PIECE_BYTES};
        @q st.shared.v4.b32 [end + 32], {{$0, $1, at, value}};
        @q st.shared.b64 [end + 48], $6;
        mov.u32 none, %clock;
        mov.u32 value, {pace};
        @q st.shared.v4.b32 [end + 16], {{none, value, none, block}};
        mov.u32 warp, $2;
        COPY:
        setp.ge.u32 p, warp, $5;
        @p bra COPIED;
        mad.wide.u32 from, warp, 8, $4;
        ld.global.b64 word, [from];
        mad.lo.u32 end, warp, 8, at;
        st.shared.b64 [end], word;
        add.u32 warp, warp, {32 * num_warps};
        bra COPY;
        COPIED:
        bar.sync 0; }}"""


@triton.jit
def start_ring(
    thread, offset, p_table, num_words, p_pieces, num_portions, total, GRANULES: tl.constexpr, SLOTS: tl.constexpr,
    WARPS: tl.constexpr, PACE: tl.constexpr,
):  # fmt: skip
    """Zeros in all slots, as a portion with fewer granules leaves the others' bytes where they are, barriers, what
    `kernels.generate.asking` needs, and behind them the program's words of the table. Returns where a thread's bytes of
    its warp's first slot are, and the warp's first barrier, `[T]` each."""
    return tl.inline_asm_elementwise(
        start_assembly(GRANULES, SLOTS, WARPS, PACE), "=&r,=&r,r,r,l,r,l,r,r",
        [thread, offset, p_table, num_words, p_pieces, num_portions, total],
        dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def states_of(offset, GRANULES: tl.constexpr, SLOTS: tl.constexpr, WARPS: tl.constexpr):
    """Where `start_ring` has put what the first warp asks by."""
    return words_of(offset - all_states_bytes(WARPS), GRANULES, SLOTS, WARPS)


@triton.jit
def words_of(offset, GRANULES: tl.constexpr, SLOTS: tl.constexpr, WARPS: tl.constexpr):
    """Where `start_ring` has put the table."""
    return tl.inline_asm_elementwise(
        "mov.u32 $0, global_smem; add.u32 $0, $0, $1;", "=&r,r", [offset + ring_bytes(GRANULES, SLOTS, WARPS)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def word_at(p_table, words, index, SINGLE: tl.constexpr):
    """Words of the table: a turn is too short to wait for one from L2."""
    if SINGLE:
        return tl.load(p_table + index)
    else:
        return tl.inline_asm_elementwise(
            "ld.shared.b64 $0, [$1];", "=l,r", [words + index * 8], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit
def next_slot(slot, parity, count, SLOTS: tl.constexpr):
    """The slot `count` after one, and the parity of its barrier, which turns at each round."""
    slot += count
    parity = tl.where(slot >= SLOTS, 1 - parity, parity)
    return tl.where(slot >= SLOTS, slot - SLOTS, slot), parity


@triton.constexpr_function
def multiply_lines(granule, portion, bits, x):
    """Lines that multiply a thread's weights of a granule, in v of the portion, by the registers x, and add them to the
    portion's a: of two rows, four sums each."""
    lines = []
    for row in range(2):
        for k in range(4):
            word, total = f"v{portion}_{8 * granule + 4 * row + k}", f"a{8 * portion + 4 * row + k}"
            for j in range(len(x) // 4):
                if bits == 32:
                    weight = f"mov.b32 t, {word};"
                elif bits == 16:
                    weight = f"shl.b32 w0, {word}, 16;" if j == 0 else f"and.b32 w0, {word}, 0xffff0000;"
                    weight += " mov.b32 t, w0;"
                else:
                    weight = f"prmt.b32 w0, {word}, 0, 0x4{j}44; mov.b32 t, w0;"
                lines.append(f"{weight} fma.rn.f32 {total}, t, {x[k * len(x) // 4 + j]}, {total};")
    return lines


@triton.constexpr_function
def weight_lines(granule, portion, address):
    """Lines that read a thread's weights of a granule."""
    lines = []
    for row in range(2):
        words = ", ".join(f"v{portion}_{8 * granule + 4 * row + k}" for k in range(4))
        lines.append(f"ld.shared.v4.b32 {{{words}}}, [{address} + {(ROWS_OF_WARP * granule + row) * GRANULE_BYTES}];")
    return lines


@triton.constexpr_function
def sum_lines(portions):
    """Lines that sum each portion's a over the warp, its results from $0 on."""
    lines = ["mov.u32 lane, %laneid; setp.lt.u32 p, lane, 16;"]
    for i in range(portions):
        a = [f"a{8 * i + k}" for k in range(8)]
        lines += [
            f"add.f32 {a[0]}, {a[0]}, {a[1]}; add.f32 {a[2]}, {a[2]}, {a[3]}; add.f32 {a[0]}, {a[0]}, {a[2]};",
            f"add.f32 {a[4]}, {a[4]}, {a[5]}; add.f32 {a[6]}, {a[6]}, {a[7]}; add.f32 {a[4]}, {a[4]}, {a[6]};",
            # Each half of the warp keeps one row and hands on the other.
            f"selp.f32 ${i}, {a[0]}, {a[4]}, p; selp.f32 {a[2]}, {a[4]}, {a[0]}, p;",
        ]
    for step in (16, 8, 4, 2, 1):
        for i in range(portions):
            given = f"a{8 * i + 2}" if step == 16 else f"${i}"
            lines.append(f"mov.b32 w{i}, {given}; shfl.sync.bfly.b32 w{i}, w{i}, {step}, 31, 0xffffffff;")
        lines += [f"mov.b32 t, w{i}; add.f32 ${i}, ${i}, t;" for i in range(portions)]
    return lines


@triton.constexpr_function
def products_assembly(granules, bits, excess, portions):
    """Assembly of `products`: operands are the results, of each portion a thread's bytes of the slot, the barrier and
    its parity, the activations and, with int8 weights, what the sums of each word begin with."""
    channels = 128 // bits  # of a thread in a granule
    first = 4 * portions + 1
    x = [f"${first + i}" for i in range(granules * channels)]
    start = [f"${first + len(x) + i}" for i in range(4)] if excess else ["0f00000000"] * 4
    lines = [f"{{ .reg .pred p; .reg .b32 w<2>, lane; .reg .f32 a<{8 * portions}>, t;", *state_lines(f"${first - 1}")]
    lines += [f".reg .b32 v{i}_<{8 * granules}>;" for i in range(portions)]
    lines += [f"mov.f32 a{4 * row + k}, {start[k]};" for row in range(2 * portions) for k in range(4)]
    for i in range(portions):
        data, barrier, parity = (f"${portions + 3 * i + k}" for k in range(3))
        lines += wait_lines(barrier, parity, f"WAIT{i}")
        for granule in range(granules):
            lines += weight_lines(granule, i, data)
        for granule in range(granules):
            lines += multiply_lines(granule, i, bits, x[granule * channels : (granule + 1) * channels])
    return "\n".join([*lines, *sum_lines(portions), "}"])


@triton.constexpr_function
def products_constraints(granules, bits, excess, portions):
    count = granules * (128 // bits) + (4 if excess else 0)
    return ",".join(["=&f"] * portions + ["r", "r", "r"] * portions + ["r"] + ["f"] * count)


@triton.jit
def products(
    data, barriers, states, slot, parity, x, start, GRANULES: tl.constexpr, BITS: tl.constexpr, EXCESS: tl.constexpr,
    PORTIONS: tl.constexpr, SLOT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A portion's rows, or those of two, times the activations x, a tuple of `[T]`, once the weights are in their
    slots, from `slot` on; for each portion `[T]`, the same for all threads of a row. With EXCESS the sums of each of a
    thread's words begin with one of `start`."""
    operands = ()
    for i in tl.static_range(PORTIONS):  # noqa: B007
        operands = append(operands, data + slot * SLOT)
        operands = append(operands, barriers + slot * 8)
        operands = append(operands, tl.zeros(data.shape, tl.int32) + parity)
        slot, parity = next_slot(slot, parity, 1, SLOTS)
    operands = append(operands, tl.zeros(data.shape, tl.int32) + states)
    for i in tl.static_range(GRANULES * (128 // BITS)):
        operands = append(operands, x[i])
    if EXCESS:
        for i in tl.static_range(4):
            operands = append(operands, start[i])
    return tl.inline_asm_elementwise(
        products_assembly(GRANULES, BITS, EXCESS, PORTIONS), products_constraints(GRANULES, BITS, EXCESS, PORTIONS),
        operands, dtype=(tl.float32,) * PORTIONS if PORTIONS > 1 else tl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.constexpr_function
def chunks_assembly(granules, bits, slots, slot_bytes, turn_bytes, excess):
    """Assembly of `products_of_chunks`: operands are the result, a thread's bytes of the first slot, the first barrier,
    the slot, its parity, how many portions, where the activations and the states are and, with int8 weights, what a
    byte has more."""
    channels = 128 // bits
    lines = [
        "{ .reg .pred p; .reg .b32 w<2>, lane, slot, parity, left, place, at, barrier; .reg .f32 a<8>, t, e<4>;",
        f".reg .b32 v0_<{8 * granules}>; .reg .f32 x<{granules * channels}>;",
        "mov.u32 slot, $3; mov.u32 parity, $4; mov.u32 left, $5; mov.u32 place, $6;",
        *state_lines("$7"),
        *(f"mov.f32 a{i}, 0f00000000;" for i in range(8)),
        *(f"mov.f32 e{i}, 0f00000000;" for i in range(4)),
        f"NEXT: mad.lo.u32 at, slot, {slot_bytes}, $1; mad.lo.u32 barrier, slot, 8, $2;",
    ]
    for granule in range(granules):
        for i in range(channels // 4):
            channel = granule * 32 * channels
            values = ", ".join(f"x{granule * channels + 4 * i + k}" for k in range(4))
            lines.append(f"ld.shared.v4.f32 {{{values}}}, [place + {channel * 4 + channel // 32 * 16 + 16 * i}];")
    lines += wait_lines("barrier", "parity", "WAIT")
    for granule in range(granules):
        lines += weight_lines(granule, 0, "at")
    for granule in range(granules):
        x = [f"x{granule * channels + i}" for i in range(channels)]
        lines += multiply_lines(granule, 0, bits, x)
        if excess:
            lines += [f"add.f32 e{i // 4}, e{i // 4}, {value};" for i, value in enumerate(x)]
    lines += [
        f"add.u32 place, place, {turn_bytes}; add.u32 slot, slot, 1;",
        f"setp.eq.u32 p, slot, {slots}; selp.b32 slot, 0, slot, p; @p xor.b32 parity, parity, 1;",
        "sub.u32 left, left, 1; setp.ne.u32 p, left, 0; @p bra NEXT;",
    ]
    if excess:
        lines += [f"fma.rn.f32 a{4 * row + k}, e{k}, $8, a{4 * row + k};" for row in range(2) for k in range(4)]
    return "\n".join([*lines, *sum_lines(1), "}"])


@triton.jit
def products_of_chunks(
    data, barriers, states, slot, parity, count, room, first, thread, GRANULES: tl.constexpr, BITS: tl.constexpr,
    INT8: tl.constexpr, SLOT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """As `products`, for `count` portions of the same rows and different channels, from channel `first` on, whose
    activations are in the room; `[T]`."""
    TURN: tl.constexpr = GRANULES * 32 * (128 // BITS)
    none = thread * 0
    operands = (
        data, barriers, none + slot, none + parity, none + count,
        room + room_place(first) + room_place((thread & 31) * (128 // BITS)), none + states,
    )  # fmt: skip
    if INT8:
        operands = append(operands, none.to(tl.float32) + EXCESS_OF_BYTE)
    return tl.inline_asm_elementwise(
        chunks_assembly(GRANULES, BITS, SLOTS, SLOT, TURN * 4 + TURN // 32 * 16, INT8),
        "=&f,r,r,r,r,r,r,r" + (",f" if INT8 else ""), operands, dtype=tl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def sum_of_row(value):
    """The sum over the threads of a row, `[T]`, to all of them."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 w; .reg .f32 t;
        mov.f32 $0, $1;
        mov.b32 w, $0; shfl.sync.bfly.b32 w, w, 8, 31, 0xffffffff; mov.b32 t, w; add.f32 $0, $0, t;
        mov.b32 w, $0; shfl.sync.bfly.b32 w, w, 4, 31, 0xffffffff; mov.b32 t, w; add.f32 $0, $0, t;
        mov.b32 w, $0; shfl.sync.bfly.b32 w, w, 2, 31, 0xffffffff; mov.b32 t, w; add.f32 $0, $0, t;
        mov.b32 w, $0; shfl.sync.bfly.b32 w, w, 1, 31, 0xffffffff; mov.b32 t, w; add.f32 $0, $0, t; }""",
        "=&f,f", [value], dtype=tl.float32, is_pure=False, pack=1,
    )  # fmt: skip
