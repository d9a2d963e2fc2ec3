"""Barriers of a launch: programs wait for each other, or the threads of one program do."""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl


@triton.jit
def arrive(p_counter, SINGLE: tl.constexpr):
    """Say that what this program stored is there. Skipped for a single program (the interpreter runs them in turn)."""
    if not SINGLE:
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .u32 t;
            bar.sync 0;
            mov.u32 t, %tid.x;
            setp.eq.u32 p, t, 0;
            @p red.release.gpu.global.add.u32 [$1], 1;
            mov.u32 $0, 0; }""",
            "=r,l", [p_counter], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def wait(p_counter, target, SINGLE: tl.constexpr):
    """Wait for `target` arrivals since the launch; what was stored before them is then visible to loads with `.cg`.

    One warp polls, relaxed: an acquire would throw away the first-level cache at each poll, and what other programs
    write is never read from it."""
    if not SINGLE:
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .u32 t;
            mov.u32 t, %tid.x;
            setp.ge.u32 p, t, 32;
            @p bra DONE;
            POLL: ld.relaxed.gpu.global.u32 t, [$1];
            sub.u32 t, t, $2;
            setp.lt.s32 p, t, 0;
            @p bra POLL;
            DONE: bar.sync 0;
            mov.u32 $0, 0; }""",
            "=r,l,r", [p_counter, target], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def block_barrier(SINGLE: tl.constexpr):
    """All threads of this program are here. Not `tl.debug_barrier`, beside which no loop is pipelined."""
    if not SINGLE:
        tl.inline_asm_elementwise(
            "bar.sync 0; mov.u32 $0, 0;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )
