"""The decoder's kernels compile for the GPUs they are meant for, and nothing spills."""

from fused_checks import CompileCase, check_compiled

ROWS = {
    "logits_ptr": "*bf16",
    "target_ptr": "*i64",
    "num_targets_ptr": "*i64",
    "loss_ptr": "*fp32",
    "correct_ptr": "*i32",
    "ignore_index": "i32",
}
SCALE = {"x_ptr": "*fp32", "scale_ptr": "*fp32", "num_elements": "i32"}


def test_no_spills():
    large = {"V": 50257, "PITCH": 50304, "BLOCK": 4096, "STAGES": 1}
    cases = [
        CompileCase("kernels.decode.rows", "decode_rows_kernel", ROWS, {**large, "WRITE_GRADIENT": True}, 8),
        CompileCase("kernels.decode.rows", "scale_kernel", SCALE, {"BLOCK": 4096, "PROGRAMS": 1024}, 8),
    ]
    check_compiled(cases)
