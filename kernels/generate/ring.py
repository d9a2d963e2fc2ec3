"""Weights on their way to the products of one lane: for each warp a ring of slots in shared memory.

A warp asks for its rows of a turn by one bulk copy, waits for them at a barrier of its own, reads them and, as soon as
it has, asks for those of the turn that will have the same slot. No warp waits for another: while one waits for
shared memory or for its sums, the others of its scheduler multiply. (The compiler's own pipeline fetches a tile for the
whole block and takes five barriers and a fence of all threads a turn.)

What `[T]` is has an element for each thread: T / R of them, neighbours in a warp, share a row. For this the compiler's
layout of a one-dimensional tensor of as many elements as there are threads is taken: element i is thread i's.

The slots lie behind what the compiler takes of shared memory for itself (`kernels.launch.reserve_shared`).
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.packets import append

GRANULE_BYTES = 512  # of a row: what a warp reads in one go, 16 bytes a thread
ROWS_OF_WARP = 2


@triton.constexpr_function
def ring_bytes(granules, slots, num_warps):
    """Bytes of the ring of a block: its slots, and a barrier for each."""
    return num_warps * slots * (granules * ROWS_OF_WARP * GRANULE_BYTES + 8)


@triton.constexpr_function
def start_assembly(granules, slots, num_warps):
    bytes_of_warp = slots * granules * ROWS_OF_WARP * GRANULE_BYTES
    return f"""{{ .reg .pred p, q; .reg .b32 end, at, warp, lane, barriers; .reg .b64 word, from;
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
        add.u32 at, at, {ring_bytes(granules, slots, num_warps)};
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
def start_ring(thread, offset, p_table, num_words, GRANULES: tl.constexpr, SLOTS: tl.constexpr, WARPS: tl.constexpr):
    """Zeros in all slots, as a turn with fewer granules leaves the others' bytes where they are, barriers, and behind
    them the program's words of the table. Returns where a thread's bytes of its warp's first slot are, and the warp's
    first barrier, `[T]` each."""
    return tl.inline_asm_elementwise(
        start_assembly(GRANULES, SLOTS, WARPS), "=&r,=&r,r,r,l,r", [thread, offset, p_table, num_words],
        dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def words_of(offset, GRANULES: tl.constexpr, SLOTS: tl.constexpr, WARPS: tl.constexpr):
    """Where `start_ring` has put the table."""
    return tl.inline_asm_elementwise(
        "mov.u32 $0, global_smem; add.u32 $0, $0, $1;", "=&r,r", [offset + ring_bytes(GRANULES, SLOTS, WARPS)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def word_at(p_table, words, index, SINGLE: tl.constexpr):
    """A word of the table: a turn is too short to wait for one from L2."""
    if SINGLE:
        return tl.load(p_table + index)
    else:
        return tl.inline_asm_elementwise(
            "ld.shared.b64 $0, [$1];", "=l,r", [words + index * 8], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit
def count_of(fetch):
    """How many pieces of a row a turn has, by its first word in `turn_table`."""
    return (fetch >> 48).to(tl.int32) & 0xFF


@triton.jit
def are_neurons(fetch):
    """Whether a turn's rows are neurons, by its first word."""
    return (fetch >> 56) != 0


@triton.jit
def ask(thread, data, barrier, p_pieces, fetch, wanted, PIECE: tl.constexpr):
    """Have a warp's pieces of a turn brought to the slot at `data`, which its threads have read; `wanted` is false past
    the last turn. `fetch` is a word of `turn_table`, PIECE a piece's elements."""
    count = count_of(fetch)
    first = (fetch & 0xFFFFFFFF) + (thread >> 5) * ((fetch >> 32) & 0xFFFF)
    # Weights are read once a token, and what else is in L2 should stay there: the policy is evict_first.
    tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b64 policy;
        bar.warp.sync 0xffffffff;
        setp.eq.u32 p, $5, 0;
        @p bra ASKED;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], $4;
        setp.eq.u32 p, $4, 0;
        @p bra ASKED;
        mov.b64 policy, 0x12F0000000000000;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [$1], [$3], $4, [$2], policy;
        ASKED: mov.u32 $0, 0; }""",
        "=r,r,r,l,r,r",
        [
            data, barrier, p_pieces + first * PIECE,
            count * (PIECE * p_pieces.dtype.element_ty.primitive_bitwidth // 8),
            ((thread & 31) == 0).to(tl.int32) * wanted.to(tl.int32),
        ],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def next_slot(slot, parity, SLOTS: tl.constexpr):
    """The slot after one, and the parity of its barrier, which turns at each round."""
    slot += 1
    parity = tl.where(slot == SLOTS, 1 - parity, parity)
    return tl.where(slot == SLOTS, 0, slot), parity


@triton.jit
def wait_for_slot(barrier, parity):
    """Until the slot's bytes are there."""
    tl.inline_asm_elementwise(
        """{ .reg .pred p;
        WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2;
        @!p bra WAIT;
        mov.u32 $0, 0; }""",
        "=r,r,r", [barrier, parity], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.constexpr_function
def products_assembly(granules, bits, excess):
    """Assembly of `products`: operands are the result, a thread's bytes of the slot, the barrier, its parity, the
    activations and, with int8 weights, what the sums of each word begin with."""
    channels = 128 // bits  # of a thread in a granule
    of_word = channels // 4
    x = [f"${4 + i}" for i in range(granules * channels)]
    start = [f"${4 + len(x) + i}" for i in range(4)] if excess else ["0f00000000"] * 4
    lines = [
        f"{{ .reg .pred p; .reg .b32 w<2>, lane, v<{8 * granules}>; .reg .f32 a<8>, t;",
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$2], $3;",
        "@!p bra WAIT;",
    ]
    for i in range(granules):
        for row in range(2):
            words = ", ".join(f"v{8 * i + 4 * row + k}" for k in range(4))
            lines.append(f"ld.shared.v4.b32 {{{words}}}, [$1 + {(2 * i + row) * 512}];")
    lines += [f"mov.f32 a{4 * row + k}, {start[k]};" for row in range(2) for k in range(4)]
    for i in range(granules):
        for row in range(2):
            for k in range(4):
                word, total = f"v{8 * i + 4 * row + k}", f"a{4 * row + k}"
                for j in range(of_word):
                    value = x[i * channels + k * of_word + j]
                    if bits == 32:
                        weight = f"mov.b32 t, {word};"
                    elif bits == 16:
                        weight = f"shl.b32 w0, {word}, 16;" if j == 0 else f"and.b32 w0, {word}, 0xffff0000;"
                        weight += " mov.b32 t, w0;"
                    else:
                        weight = f"prmt.b32 w0, {word}, 0, 0x4{j}44; mov.b32 t, w0;"
                    lines.append(f"{weight} fma.rn.f32 {total}, t, {value}, {total};")
    lines += [
        "add.f32 a0, a0, a1; add.f32 a2, a2, a3; add.f32 a0, a0, a2;",
        "add.f32 a4, a4, a5; add.f32 a6, a6, a7; add.f32 a4, a4, a6;",
        # Each half of the warp keeps one row and hands on the other.
        "mov.u32 lane, %laneid; setp.lt.u32 p, lane, 16;",
        "selp.f32 a1, a0, a4, p; selp.f32 a2, a4, a0, p;",
        "mov.b32 w0, a2; shfl.sync.bfly.b32 w1, w0, 16, 31, 0xffffffff; mov.b32 t, w1; add.f32 a1, a1, t;",
    ]
    for step in (8, 4, 2, 1):
        lines.append(f"mov.b32 w0, a1; shfl.sync.bfly.b32 w1, w0, {step}, 31, 0xffffffff; mov.b32 t, w1;")
        lines.append("add.f32 a1, a1, t;")
    return "\n".join([*lines, "mov.f32 $0, a1; }"])


@triton.constexpr_function
def products_constraints(granules, bits, excess):
    count = granules * (128 // bits) + (4 if excess else 0)
    return ",".join(["=&f", "r", "r", "r"] + ["f"] * count)


@triton.jit
def products(data, barrier, parity, x, start, GRANULES: tl.constexpr, BITS: tl.constexpr, EXCESS: tl.constexpr):
    """A turn's rows times the activations x, a tuple of `[T]`, once its weights are there; `[T]`, the same for all
    threads of a row. With EXCESS the sums of each of a thread's words begin with one of `start`."""
    operands = (data, barrier, tl.zeros(data.shape, tl.int32) + parity)
    for i in tl.static_range(GRANULES * (128 // BITS)):
        operands = append(operands, x[i])
    if EXCESS:
        for i in tl.static_range(4):
            operands = append(operands, start[i])
    return tl.inline_asm_elementwise(
        products_assembly(GRANULES, BITS, EXCESS), products_constraints(GRANULES, BITS, EXCESS), operands,
        dtype=tl.float32, is_pure=False, pack=1,
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
