"""The cortex kernels compile for the GPUs they are meant for, without spills and within shared memory."""

import re

import pytest
from compiler import call_in_compiler

from kernels.cortex import SPIKES

pytest.importorskip("triton")

UNSPECIALIZED = {"T", "B", "start_stride_b", "start_stride_t", "rows_per_slice", "num_slices", "num_tiles"}
IN_STORAGE = {"drive", "spikes", "excess", "grad_spikes", "grad_drive"}
SCAN = {"L": 8, "THRESHOLD": 0.5, "ADAPTATION_STRENGTH": 0.5, "ADAPTATION_DECAY": 0.95, "HAS_START": True, "SAVE": True}


def compile_all(cases):
    from kernels.offline import SHARED_LIMITS

    results = call_in_compiler("test_cortex_compile", "compile_cases", cases)
    num_scans = sum(4 if is_half and width >= 64 else 2 for is_half, width, _, _ in cases)
    assert len(results) == num_scans + 2 * sum(kind == "graded" for *_, kind, _ in cases)
    for result in results:
        # 128 registers let two programs share a multiprocessor; at 128 neurons backward wants three more, which it puts
        # aside in 7 of some 900 instructions a token. Timed on a GPU, that costs nothing.
        few = 8 if result["name"].startswith("cortex_backward_kernel *bf16 {'C': 128") else 0
        assert result["spills"] <= few, result
        assert result["shared"] <= SHARED_LIMITS[result["capability"]], result
        assert result["registers"] <= 65536, result
    return results


def compile_cases(cases):
    """What `compile_all` asks of the process that compiles: of each kernel, what it uses and what its code holds."""
    from kernels.cortex import launches, parameter_gradient, scan, scan_one_lane

    results = []
    for is_half, width, kind, capability in cases:
        storage = "*bf16" if is_half else "*fp32"
        config = launches.SCAN_CONFIGS[is_half, width]
        constants = SCAN | {"C": width, "KIND": kind, "RELOAD": launches.reloads_weights(is_half, width)}
        for kernel in (scan.cortex_forward_kernel, scan.cortex_backward_kernel):
            results.append(compile_one(kernel, storage, constants, capability, *config))
        if is_half and width in launches.ONE_LANE_WIDTHS:
            for kernel in (scan_one_lane.cortex_forward_one_lane_kernel, scan_one_lane.cortex_backward_one_lane_kernel):
                results.append(compile_one(kernel, storage, constants, capability, width // 32))
        if kind != "graded":
            continue  # the kernels below know nothing of spikes
        rows, num_warps = launches.SLICE_CONFIGS[is_half, width]
        constants = {"C": width, "ROWS": rows, "HAS_START": True}
        results.append(compile_one(parameter_gradient.slice_kernel, storage, constants, capability, num_warps))
        results.append(compile_one(parameter_gradient.finish_kernel, storage, {"C": width}, capability, 4))
    return results


def compile_one(kernel, storage, constants, capability, num_warps, max_registers=None):
    from kernels.offline import compile_kernel

    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {}
    for name in kernel.arg_names:
        integer = name in UNSPECIALIZED or name == "D" or "stride" in name
        kind = "constexpr" if name in constants else "i32" if integer else storage if name in IN_STORAGE else "*fp32"
        signature[name] = {"document_start": "*u8", "counts": "*i32"}.get(name, kind)
    resources, code = compile_kernel(
        kernel,
        signature,
        constants,
        capability=capability,
        num_warps=num_warps,
        divisible={name for name, kind in signature.items() if kind == "i32"} - UNSPECIALIZED,
        max_registers=max_registers,
    )
    return {
        "name": f"{kernel.fn.__name__} {storage} {constants} sm_{capability}",
        "capability": capability,
        "storage": storage,
        "spills": code.count("LDL") + code.count("STL"),
        "shared": resources.shared_bytes,
        "registers": resources.registers * num_warps * 32,
        "matrix": code.count("HMMA") + code.count("HGMMA"),
        "wide_loads": code.count("LDG.E.64"),
        "barriers": longest_loop(code).count("BAR.SYNC"),
    }


def longest_loop(code):
    """The longest stretch of machine code that ends in a jump to its beginning."""
    jumps = ((jump, code.find(jump[1] + ":")) for jump in re.finditer(r"BRA\S* `\((\.L\w+)\)", code))
    return max((code[label : jump.start()] for jump, label in jumps if 0 <= label < jump.start()), key=len, default="")


def test_the_base_and_small_models_shapes():
    results = compile_all([(True, 128, "graded", 90), (True, 64, "graded", 90), (True, 128, "smooth", 90)])
    for result in results:
        if "finish" not in result["name"]:
            assert (result["matrix"] > 0) == (result["storage"] == "*bf16"), result
        if "one_lane" in result["name"]:
            assert result["barriers"] == 2, result  # around the spikes' exchange, and nothing else is exchanged
        elif "cortex_" in result["name"]:
            assert result["wide_loads"] > 0, result  # four neurons a load, not one


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_half", [True, False])
def test_every_shape(is_half):
    compile_all(
        [(is_half, width, kind, capability)
         for width in (16, 32, 64, 128) for kind in SPIKES for capability in (89, 90)]
    )  # fmt: skip
