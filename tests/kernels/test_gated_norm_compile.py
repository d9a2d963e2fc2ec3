"""The gated norm's kernels compile for GPUs that are not there: no spills, and loads and stores of 16 bytes."""

import inspect

from compiler import call_in_compiler


def test_kernels_stream_without_spilling() -> None:
    for stack, num_wide_loads, num_wide_stores in call_in_compiler("test_gated_norm_compile", "compile_kernels"):
        assert stack == 0
        assert num_wide_loads > 0
        assert num_wide_stores > 0


def compile_kernels() -> list[tuple[int, int, int]]:
    """Of each kernel and GPU: bytes of stack a thread, and how many loads and stores of 16 bytes there are."""
    from kernels.gated_norm import fused
    from kernels.offline import compile_kernel

    rows = []
    for kernel in (fused.gated_norm_forward_kernel, fused.gated_norm_backward_kernel):
        for capability, group in ((90, 128), (89, 64)):
            constants = {"GROUP": group, "PADDED": group, "NUM": fused.BLOCK // group, "HAS_SCALE": True}
            signature = {
                name: "*bf16" if name.endswith("_ptr") else "fp32" if name == "eps" else "i32"
                for name in inspect.signature(kernel.fn).parameters
            }
            signature |= dict.fromkeys(constants, "constexpr")
            used, code = compile_kernel(
                kernel,
                signature,
                constants,
                capability=capability,
                num_warps=fused.NUM_WARPS,
                divisible=[name for name in signature if "stride" in name],
            )
            rows.append((used.stack_bytes, code.count("LDG.E.128"), code.count("STG.E.128")))
    return rows
