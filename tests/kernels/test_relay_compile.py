"""The relay's kernels compile for the GPUs they are meant for, and nothing spills."""

import pytest
from fused_checks import CompileCase, compile_cases

from kernels.offline import SHARED_LIMITS

FORWARD = {
    "history_ptr": "*i64",
    "embedding_ptr": "*bf16",
    "taps_ptr": "*fp32",
    "start_ptr": "*i1",
    "x_ptr": "*bf16",
    "carried_ptr": "*i64",
    "num_tokens": "i32",
    "vocab_size": "i32",
    "eps": "fp32",
}
SUM_RUNS = {
    "grad_x_ptr": "*bf16",
    "id_ptr": "*i32",
    "slot_ptr": "*i64",
    "embedding_ptr": "*bf16",
    "taps_ptr": "*fp32",
    "start_ptr": "*i1",
    "grad_embedding_ptr": "*bf16",
    "partial_ptr": "*fp32",
    "grad_taps_ptr": "*fp32",
    "num_sorted": "i32",
    "num_tokens": "i32",
    "vocab_size": "i32",
    "eps": "fp32",
}
JOIN_RUNS = {
    "id_ptr": "*i32",
    "partial_ptr": "*fp32",
    "embedding_ptr": "*bf16",
    "grad_embedding_ptr": "*bf16",
    "num_programs": "i32",
    "vocab_size": "i32",
    "eps": "fp32",
}


@pytest.mark.parametrize("capability", [89, 90])
def test_no_spills(capability):
    taps = {"J": 4, "BLOCK_J": 4, "HAS_START": True}
    width = {"D": 1536, "BLOCK_D": 2048}
    cases = [
        CompileCase("kernels.relay.fused", "relay_forward_kernel", FORWARD, {**taps, **width}, capability, 8),
        CompileCase(
            "kernels.relay.backward", "relay_sum_runs_kernel", SUM_RUNS, {**taps, **width, "SLOTS": 32}, capability, 8
        ),
        CompileCase(
            "kernels.relay.backward",
            "relay_join_runs_kernel",
            JOIN_RUNS,
            {**width, "SLOTS": 32, "PARTIALS": 8},
            capability,
            8,
        ),
    ]
    for case, compiled in zip(cases, compile_cases(cases), strict=True):
        assert compiled.stack_bytes == 0, case.kernel
        assert compiled.shared_bytes <= SHARED_LIMITS[capability], case.kernel
        assert "ATOM" not in compiled.machine_code, case.kernel
        assert "RED." not in compiled.machine_code, case.kernel
