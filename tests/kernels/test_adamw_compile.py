"""What comes before AdamW's launch compiles for the GPUs it is meant for, and nothing spills."""

from fused_checks import CompileCase, check_compiled

CORRECTIONS = {"table_ptr": "*i64", "correction_ptr": "*fp32", "skip_ptr": "*fp32", "num_params": "i32"}


def test_no_spills():
    constants = {"LOG_BETA1": -0.1, "LOG_BETA2": -0.05, "BLOCK": 64}
    check_compiled([CompileCase("kernels.adamw.fused", "adamw_corrections_kernel", CORRECTIONS, constants, 4)])
