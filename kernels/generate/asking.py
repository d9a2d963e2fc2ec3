"""Asking for weights while waiting for something else.

Whatever a program asks for queues at the memory, and a packet that a phase waits for queues behind it: with all that a
ring has room for on its way, a round of packets takes 4 us in place of 1.3. So a warp asks for one portion at a time,
at intervals, wherever it happens to be: polling packets, waiting for weights or for the other warps, or between two
turns. What it needs for that is in shared memory, 64 bytes a warp, since the waiting is done by assembly in many
places:

    0: next portion of a token's, portions left, slot of the next portion, slots that are free
    16: clock from which on the next may be asked for, clocks for each granule, not used, address of the block's barrier
    32: address of the warp's first slot, of its first barrier, of the portions' words, bytes of a slot
    48: address of the weights, portions of a token, slots
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

GRANULE_BYTES = 512  # of a row: what a warp reads in one go, 16 bytes a thread
ROWS_OF_WARP = 2
PIECE_BYTES = ROWS_OF_WARP * GRANULE_BYTES
STATE_BYTES = 64  # of a warp


@triton.constexpr_function
def state_lines(base):
    """Lines that find the warp's state from that of the first warp."""
    return [
        ".reg .b32 state; mov.u32 state, %tid.x; shr.u32 state, state, 5;",
        f"mad.lo.u32 state, state, {STATE_BYTES}, {base};",
    ]


@triton.constexpr_function
def ask_lines():
    """Lines that ask for a portion, if there is a slot and it is time; the whole warp executes them together."""
    return [
        "{ .reg .pred p, first; .reg .b32 next, left, slot, free, due, pace, late, slots, size, portions;",
        ".reg .b32 data, barriers, words, warp, at, bytes, piece, now; .reg .b64 weights, word, from, policy;",
        "ld.shared.v4.b32 {next, left, slot, free}, [state]; ld.shared.v2.b32 {due, pace}, [state + 16];",
        # Too early is up to 2^20 clocks before: the counter begins anew every two seconds, and a launch may be held up.
        "mov.u32 now, %clock; sub.u32 late, now, due; not.b32 at, late; setp.ge.u32 p, at, 0x100000;",
        "setp.gt.and.s32 p, left, 0, p; setp.gt.and.s32 p, free, 0, p;",
        # Clocks of two threads may differ.
        "vote.sync.all.pred p, p, 0xffffffff; @!p bra ENOUGH;",
        "ld.shared.v4.b32 {data, barriers, words, size}, [state + 32];",
        "ld.shared.b64 weights, [state + 48]; ld.shared.v2.b32 {portions, slots}, [state + 56];",
        "mov.u32 at, %laneid; setp.eq.u32 first, at, 0; mov.u32 warp, %tid.x; shr.u32 warp, warp, 5;",
        "mad.lo.u32 at, next, 8, words; ld.shared.b64 word, [at];",
        "cvt.u32.u64 piece, word; shr.u64 word, word, 32; cvt.u32.u64 bytes, word;",
        "and.b32 at, bytes, 0xffff; mad.lo.u32 piece, at, warp, piece; shr.u32 bytes, bytes, 16;",
        # Who is late by a portion or more does not catch up on more than one.
        "mul.lo.u32 pace, pace, bytes; min.u32 late, late, pace; sub.u32 due, now, late; add.u32 due, due, pace;",
        f"mul.lo.u32 bytes, bytes, {PIECE_BYTES}; mul.wide.u32 from, piece, {PIECE_BYTES};",
        "add.s64 from, from, weights;",
        "mad.lo.u32 at, slot, 8, barriers; mad.lo.u32 piece, slot, size, data;",
        # Weights are read once a token, and what else is in L2 should stay there: the policy is evict_first.
        "mov.b64 policy, 0x12F0000000000000;",
        "@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [at], bytes;",
        "@first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [piece], [from], bytes, [at], policy;",
        "add.u32 next, next, 1; setp.eq.u32 p, next, portions; @p mov.u32 next, 0;",
        "add.u32 slot, slot, 1; setp.eq.u32 p, slot, slots; @p mov.u32 slot, 0;",
        "sub.u32 left, left, 1; sub.u32 free, free, 1; bar.warp.sync 0xffffffff;",
        "@first st.shared.v4.b32 [state], {next, left, slot, free}; @first st.shared.b32 [state + 16], due;",
        "bar.warp.sync 0xffffffff; ENOUGH: }",
    ]


@triton.constexpr_function
def wait_lines(barrier, parity, name):
    """Lines that wait for a slot's bytes, and ask meanwhile."""
    return [
        f"{name}: mbarrier.test_wait.parity.shared::cta.b64 p, [{barrier}], {parity};",
        f"vote.sync.all.pred p, p, 0xffffffff; @p bra {name}_DONE;",
        *ask_lines(),
        f"bra {name}; {name}_DONE:",
    ]


@triton.constexpr_function
def release_assembly():
    lines = [
        "{ .reg .pred first; .reg .b32 lane, free;",
        *state_lines("$1"),
        "bar.warp.sync 0xffffffff; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0;",
        "ld.shared.b32 free, [state + 12]; add.u32 free, free, $2; bar.warp.sync 0xffffffff;",
        "@first st.shared.b32 [state + 12], free; bar.warp.sync 0xffffffff;",
        *ask_lines(),
        "mov.u32 $0, 0; }",
    ]
    return "\n".join(lines)


@triton.jit
def release(states, count, SINGLE: tl.constexpr):
    """`count` more slots have been read; ask for what may come to them."""
    if not SINGLE:
        tl.inline_asm_elementwise(
            release_assembly(), "=r,r,r", [states, count], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


@triton.constexpr_function
def drain_assembly(slots):
    lines = [
        "{ .reg .pred p; .reg .b32 slot, parity, num, at, barriers;",
        *state_lines("$1"),
        "ld.shared.b32 num, [state + 12]; ld.shared.b32 barriers, [state + 36];",
        f"sub.u32 num, {slots}, num; mov.u32 slot, $2; mov.u32 parity, $3;",
        "NEXT: setp.eq.u32 p, num, 0; @p bra ALL;",
        "mad.lo.u32 at, slot, 8, barriers;",
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [at], parity; @!p bra WAIT;",
        f"sub.u32 num, num, 1; add.u32 slot, slot, 1; setp.eq.u32 p, slot, {slots};",
        "@p mov.u32 slot, 0; @p xor.b32 parity, parity, 1; bra NEXT;",
        "ALL: mov.u32 $0, 0; }",
    ]
    return "\n".join(lines)


@triton.jit
def drain(states, slot, parity, SLOTS: tl.constexpr):
    """Wait for all that is on its way, from `slot` on: a block may not end before."""
    tl.inline_asm_elementwise(
        drain_assembly(SLOTS), "=r,r,r,r", [states, slot, parity], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.constexpr_function
def block_lines():
    """Lines of a barrier of the block, at which a warp that waits asks for weights."""
    return [
        "{ .reg .pred p; .reg .b32 lane, low, high, at; .reg .b64 token;",
        "bar.warp.sync 0xffffffff; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; ld.shared.b32 at, [state + 28];",
        "mov.b64 token, 0; @p mbarrier.arrive.shared::cta.b64 token, [at];",
        "mov.b64 {low, high}, token; shfl.sync.idx.b32 low, low, 0, 31, 0xffffffff;",
        "shfl.sync.idx.b32 high, high, 0, 31, 0xffffffff; mov.b64 token, {low, high};",
        "BLOCK: mbarrier.test_wait.shared::cta.b64 p, [at], token;",
        "vote.sync.all.pred p, p, 0xffffffff; @p bra ALL_HERE;",
        *ask_lines(),
        "bra BLOCK; ALL_HERE: }",
    ]


@triton.constexpr_function
def together_assembly(asks):
    barrier = [*state_lines("$2"), *block_lines()] if asks else ["bar.sync 0;"]
    return "\n".join(["{", *barrier, "mov.u32 $0, $1; }"])


@triton.jit
def together(value, states, ASKS: tl.constexpr):
    """The value once all threads of the block are here; loads that hang on it stay behind. With ASKS a warp that waits
    asks for weights."""
    return tl.inline_asm_elementwise(
        together_assembly(ASKS), "=r,r,r", [value, states], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip
