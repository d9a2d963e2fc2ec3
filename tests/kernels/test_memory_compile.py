"""The memory's kernels compile for GPUs that are not there, without spilling and within their shared memory."""

import inspect

import pytest
import torch
from compiler import call_in_compiler

from kernels.memory import chunk_backward, chunk_forward, chunk_gradient, chunk_parallel
from kernels.memory.launch_table import launch_table, parallel_table
from kernels.offline import compile_kernel

FLOAT32 = ("state_ptr", "final_state_ptr", "final_state_grad_ptr", "state_grad_ptr", "sums_ptr", "carries_ptr")
TENSORS = ("query", "key", "value", "output", "input", "left", "right")
KERNELS = {
    "inverse": chunk_forward.triangular_inverse_kernel,
    "forward": chunk_forward.memory_forward_kernel,
    "recompute": chunk_forward.memory_forward_kernel,
    "state_gradient": chunk_backward.memory_state_gradient_kernel,
    "gradient": chunk_gradient.memory_gradient_kernel,
    "parallel_sum": chunk_parallel.memory_chunk_sum_kernel,
    "parallel_walk": chunk_parallel.memory_chunk_walk_kernel,
    "parallel_output": chunk_parallel.memory_chunk_output_kernel,
    "parallel_gradient": chunk_gradient.memory_gradient_kernel,
}

Case = tuple[str, int, str, int, bool]
# Bytes a thread that go to the stack, of programs of two to nine thousand instructions: where a limit on registers lets
# another program run beside one, or where a program holds a whole head of 128.
STACK_ALLOWED = {
    ("forward", 90, "bfloat16", 64, True): 256,
    ("forward", 90, "bfloat16", 128, False): 128,
    ("forward", 90, "bfloat16", 128, True): 640,
    ("recompute", 90, "bfloat16", 128, False): 128,
    ("recompute", 90, "bfloat16", 128, True): 64,
    ("state_gradient", 90, "bfloat16", 128, False): 160,
    ("state_gradient", 90, "bfloat16", 128, True): 384,
    ("gradient", 90, "bfloat16", 64, False): 256,
    ("parallel_gradient", 90, "bfloat16", 128, False): 64,
    ("gradient", 90, "bfloat16", 128, False): 384,
    ("gradient", 90, "bfloat16", 128, True): 512,
}
SHARED = {89: 99 * 1024, 90: 227 * 1024}


def check(cases: list[Case]) -> None:
    results = call_in_compiler("test_memory_compile", "compile_cases", cases)
    for case, result in zip(cases, results, strict=True):
        _, stack, shared, num_wgmma, num_wide_loads = result
        name, capability, dtype, width, _ = case
        assert shared <= SHARED[capability], (case, shared)
        assert stack <= STACK_ALLOWED.get(case, 16), (case, stack)
        if dtype == "bfloat16" and width >= 64:
            assert num_wide_loads > 0, case
            assert num_wgmma > 0 or capability != 90 or name in ("inverse", "parallel_walk"), case


def compile_cases(cases: list[Case]) -> list[list[int]]:
    """What `check` asks of the process that compiles."""
    return [compile_case(*case) for case in cases]


def compile_case(name: str, capability: int, dtype_name: str, width: int, delta: bool) -> list[int]:
    """Registers, stack bytes, shared bytes, and how many warp-group products and loads of 16 bytes there are."""
    dtype = getattr(torch, dtype_name)
    table = launch_table(dtype, width, delta=delta, large_shared=capability == 90)
    if name.startswith("parallel_"):
        parallel = parallel_table(width, large_shared=capability == 90)
        kernel, launch = KERNELS[name], getattr(parallel, name.removeprefix("parallel_")) or table.gradient
    else:
        kernel, launch = KERNELS[name], getattr(table, name)
    constants = {"WIDTH": width, "LENGTH": table.length, "HAS_STARTS": True}
    if name == "parallel_walk":
        constants = {"SIZE": width * width, "BLOCK": launch.tile, "BACKWARD": True, "HAS_STATE": True}
    elif name == "inverse":
        constants["LEVELS"] = table.length.bit_length() - 1
        constants["PRECISION"] = "ieee" if dtype == torch.float32 else "tf32"
    else:
        constants |= {"TILE": launch.tile, "DELTA": delta}
    if kernel is chunk_forward.memory_forward_kernel:
        constants["RECOMPUTE"] = name == "recompute"
    if name == "state_gradient":
        constants["HAS_STATE_GRAD"] = True
    if name == "parallel_sum":
        constants["TO_END"] = True
    if name in ("parallel_sum", "parallel_output"):
        del constants["DELTA"]
    pointer = "*fp32" if dtype == torch.float32 else "*bf16"
    signature: dict[str, str] = {}
    aligned = []
    for argument in inspect.signature(kernel.fn).parameters:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = "*i8" if argument == "start_ptr" else "*fp32" if argument in FLOAT32 else pointer
        else:
            signature[argument] = "fp32" if argument == "eps" else "i32"
            if "stride" in argument and argument.split("_")[0] in TENSORS:
                aligned.append(argument)
    used, code = compile_kernel(
        kernel,
        signature,
        constants,
        capability=capability,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        max_registers=launch.max_registers,
        divisible=aligned,
    )
    return [*used, code.count("HGMMA"), code.count("LDG.E.128") + code.count("LDGSTS.E.BYPASS.128")]


def test_widest_heads_do_not_spill() -> None:
    check(
        [
            ("forward", 90, "bfloat16", 128, False),
            ("gradient", 90, "bfloat16", 128, False),
            ("state_gradient", 90, "bfloat16", 128, True),
            ("recompute", 89, "bfloat16", 128, True),
            ("parallel_sum", 90, "bfloat16", 128, False),
            ("parallel_walk", 90, "bfloat16", 128, False),
            ("parallel_output", 90, "bfloat16", 128, False),
            ("parallel_gradient", 90, "bfloat16", 128, False),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("capability", [89, 90])
def test_whole_table(capability: int, dtype: str, width: int, delta: bool) -> None:
    names = ["forward", "recompute", "state_gradient", "gradient"] + ["inverse"] * delta
    if dtype == "bfloat16" and not delta:
        names += ["parallel_sum", "parallel_walk", "parallel_output", "parallel_gradient"]
    check([(name, capability, dtype, width, delta) for name in names])
