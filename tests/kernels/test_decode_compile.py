"""The decoder's kernels compile for the GPUs they are meant for, and nothing spills."""

import pytest
from fused_checks import CompileCase, compile_cases

from kernels.offline import SHARED_LIMITS

ROWS = {
    "logits_ptr": "*bf16",
    "target_ptr": "*i64",
    "num_targets_ptr": "*i64",
    "loss_ptr": "*fp32",
    "correct_ptr": "*i32",
    "ignore_index": "i32",
}
SCALE = {"x_ptr": "*fp32", "scale_ptr": "*fp32", "num_elements": "i32"}


@pytest.mark.parametrize("capability", [89, 90])
def test_no_spills(capability):
    large = {"V": 50257, "PITCH": 50304, "BLOCK": 4096}
    cases = [
        CompileCase(
            "kernels.decode.rows", "decode_rows_kernel", ROWS, {**large, "WRITE_GRADIENT": True}, capability, 8
        ),
        CompileCase("kernels.decode.rows", "scale_kernel", SCALE, {"BLOCK": 4096, "PROGRAMS": 1024}, capability, 8),
    ]
    for case, compiled in zip(cases, compile_cases(cases), strict=True):
        assert compiled.stack_bytes == 0, case.kernel
        assert compiled.shared_bytes <= SHARED_LIMITS[capability], case.kernel
