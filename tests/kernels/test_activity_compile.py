"""The kernels of activity compile for the GPUs they are meant for, and nothing spills."""

from fused_checks import CompileCase, check_compiled

SHARES = {"fired_ptr": "*i32", "saturated_ptr": "*i32", "share_ptr": "*fp32", "num_tokens": "i32"}
PULL = {
    "fired_ptr": "*i32",
    "num_targets_ptr": "*i64",
    "grad_ptr": "*fp32",
    "pull_ptr": "*fp32",
    "num_elements": "i32",
    "num_tokens": "i32",
}


def test_no_spills():
    shares = {"D": 1536, "SATURATED_SHARE": 0.5, "BLOCK": 2048}
    pull = {"STRENGTH": 0.03, "TARGET": 0.15, "BLOCK": 512}
    check_compiled(
        [
            CompileCase("kernels.activity.fused", "activity_shares_kernel", SHARES, shares, 8),
            CompileCase("kernels.activity.fused", "homeostatic_pull_kernel", PULL, pull, 4),
        ]
    )
