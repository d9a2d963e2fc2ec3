"""Activations that say themselves when they are there: a float32 with the number of its token.

What a phase reads of the phase before it, it polls until each value bears the token's number. That takes one round trip
to L2 where a barrier takes three (the stores, the counter, the loads), and needs no fence, since a packet is stored at
once. Each value of a token has a place of its own: it is written again only after the barrier that ends the token.

A packet is an int64, value and number, or an int32: a value cut to 22 bits and the last two of the number, which are
enough, since what stands there otherwise is the last token's. All programs poll all values of a phase again and again,
so that a packet's bytes cross L2 beside the weights. Which is quicker hangs on the weights (docs/GENERATION.md).

Per layer: x `[D]` (its input), y `[D]` and the groups' values `[D]` (what out_proj reads), x `[D]` (what the SwiGLU
reads), hidden `[M]`, inner `[4D]`; then the decoder's x, padded to a layer's length, and the gates `[K]`.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.asking import ask_lines, state_lines


@triton.jit
def append(items, item):
    """A tuple and one more."""
    return items + (item,)  # noqa: RUF005, a compiled function cannot unpack


@triton.jit
def value_in(bits, WIDE: tl.constexpr):
    """The value of a packet or of its lower word."""
    return (bits.to(tl.int32) if WIDE else bits & -4).to(tl.float32, bitcast=True)


@triton.jit
def value_of(packet):
    return value_in(packet, packet.dtype == tl.int64)


@triton.jit
def packet_of(value, epoch, WIDE: tl.constexpr):
    """A value and the number of its token."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    if WIDE:
        return (bits.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)
    else:
        return (bits & -4) | (epoch & 3)  # not rounded: that would carry a NaN over to zero


@triton.jit
def send(p_packets, value, epoch, mask):
    """Store values with the number of their token."""
    tl.store(p_packets, packet_of(value, epoch, p_packets.dtype.element_ty == tl.int64), mask=mask)


@triton.jit
def send_here(p_packets, value, epoch, mask, SINGLE: tl.constexpr):
    """As `send`, from the threads that hold the values, all of them: a store of Triton's would first hand the values
    round through shared memory."""
    WIDE: tl.constexpr = p_packets.dtype.element_ty == tl.int64
    if SINGLE:
        send(p_packets, value, epoch, mask)
    elif WIDE:
        bits, epochs = value.to(tl.int32, bitcast=True), tl.zeros(value.shape, tl.int32) + epoch
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b64 d;
            setp.ne.u32 p, $4, 0;
            mov.b64 d, {$2, $3};
            @p st.relaxed.gpu.global.b64 [$1], d;
            mov.u32 $0, 0; }""",
            "=r,l,r,r,r", [p_packets, bits, epochs, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        packets = packet_of(value, epoch, False)
        tl.inline_asm_elementwise(
            """{ .reg .pred p;
            setp.ne.u32 p, $3, 0;
            @p st.relaxed.gpu.global.b32 [$1], $2;
            mov.u32 $0, 0; }""",
            "=r,l,r,r", [p_packets, packets, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
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


@triton.jit
def load_four(p, SINGLE: tl.constexpr):
    """Four float32 at each p, a multiple of 16 bytes, in the layout of p."""
    if SINGLE:
        return tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)
    else:
        return tl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", [p], dtype=(tl.float32,) * 4,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def store_four(p, values, mask, SINGLE: tl.constexpr):
    """The inverse of `load_four`, from the threads that hold the values."""
    if SINGLE:
        for i in tl.static_range(4):
            tl.store(p + i, values[i], mask=mask)
    else:
        operands = (p,)
        for i in tl.static_range(4):
            operands = append(operands, values[i].to(tl.int32, bitcast=True))
        tl.inline_asm_elementwise(
            """{ .reg .pred p;
            setp.ne.u32 p, $6, 0;
            @p st.relaxed.gpu.global.v4.b32 [$1], {$2, $3, $4, $5};
            mov.u32 $0, 0; }""",
            "=r,l,r,r,r,r,r", append(operands, mask.to(tl.int32)), dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.constexpr_function
def poll_pairs_assembly(pairs, singles, wide):
    """Assembly that polls pairs of packets and single ones until all of the warp's bear the number in the last operand
    but one; the first values of all pairs come first, then the second ones, then the single ones. The last operand is
    where the warps' states are, as it asks for weights meanwhile."""
    count, places = 2 * pairs + singles, pairs + singles
    pointer, epoch = count, count + places
    packet, size = ("d{}", "b64") if wide else ("${}", "b32")
    lines = [f"{{ .reg .pred p, q<{places}>; .reg .b32 wrong; .reg .u32 e<{count}>; .reg .b64 d<{count}>;"]
    lines += [*state_lines(f"${epoch + 1}"), *(f"setp.eq.u32 q{i}, 0, 0;" for i in range(places)), "POLL:"]
    for i in range(places):
        # Only what has not come is read again.
        if i < pairs:
            pair = f"{{{packet.format(i)}, {packet.format(pairs + i)}}}"
            lines.append(f"@q{i} ld.relaxed.gpu.global.v2.{size} {pair}, [${pointer + i}];")
        else:
            lines.append(f"@q{i} ld.relaxed.gpu.global.{size} {packet.format(pairs + i)}, [${pointer + i}];")
    if wide:
        lines += [f"mov.b64 {{${i}, e{i}}}, d{i};" for i in range(count)]
    for i in range(places):
        of_place = [i, pairs + i] if i < pairs else [pairs + i]
        if wide:
            lines += [f"setp.ne.u32 q{i}, e{of_place[0]}, ${epoch};"]
            lines += [f"setp.ne.or.u32 q{i}, e{k}, ${epoch}, q{i};" for k in of_place[1:]]
        else:
            lines += ["mov.b32 wrong, 0;"]
            lines += [f"lop3.b32 wrong, ${k}, ${epoch}, wrong, 0xbe;" for k in of_place]  # wrong | (packet ^ epoch)
            lines += [f"and.b32 wrong, wrong, 3; setp.ne.u32 q{i}, wrong, 0;"]
    lines += ["mov.pred p, q0;", *(f"or.pred p, p, q{i};" for i in range(1, places))]
    lines += ["vote.sync.any.pred p, p, 0xffffffff; @!p bra DONE;", *ask_lines(), "bra POLL; DONE: }"]
    return "\n".join(lines)


@triton.constexpr_function
def poll_pairs_constraints(pairs, singles):
    return ",".join(["=&r"] * (2 * pairs + singles) + ["l"] * (pairs + singles) + ["r", "r"])


@triton.jit
def receive_pairs(p_packets, epoch, states, PAIRS: tl.constexpr, SINGLE: tl.constexpr = False):
    """Values at a tuple of pointers (of one shape), once all of a thread's bear the number `epoch`: at the first PAIRS
    pointers, at even places, then those behind them, then those at the other pointers."""
    SINGLES: tl.constexpr = len(p_packets) - PAIRS
    WIDE: tl.constexpr = p_packets[0].dtype.element_ty == tl.int64
    values = ()
    if SINGLE:
        for i in tl.static_range(2 * PAIRS + SINGLES):
            SECOND: tl.constexpr = i >= PAIRS and i < 2 * PAIRS
            p = p_packets[i - PAIRS if i >= PAIRS else i]
            values = append(values, value_of(tl.load(p + (1 if SECOND else 0))))
    else:
        epochs = tl.zeros(p_packets[0].shape, tl.int32) + epoch
        bits = (epochs,) * (2 * PAIRS + SINGLES)
        # A loop of one turn: the compiler would repeat the polling in each layout that its values are wanted in, but
        # not a loop.
        again = epoch
        while again > 0:
            bits = tl.inline_asm_elementwise(
                poll_pairs_assembly(PAIRS, SINGLES, WIDE), poll_pairs_constraints(PAIRS, SINGLES),
                append(append(p_packets, epochs), epochs * 0 + states), dtype=(tl.int32,) * (2 * PAIRS + SINGLES),
                is_pure=False, pack=1,
            )  # fmt: skip
            again = epoch * 0
        for i in tl.static_range(2 * PAIRS + SINGLES):
            values = append(values, value_in(bits[i], WIDE))
    return values
