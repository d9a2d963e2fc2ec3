"""The decoder's kernels compile for the GPUs they are meant for, and nothing spills."""

import pytest
from fused_checks import CompileCase, check_compiled

ROWS = {
    "logits_ptr": "*bf16",
    "target_ptr": "*i64",
    "num_targets_ptr": "*i64",
    "loss_ptr": "*fp32",
    "correct_ptr": "*i32",
    "ignore_index": "i32",
}
COUNT = {
    "target_ptr": "*i64",
    "num_targets_ptr": "*i64",
    "zeroed_ptr": "*i32",
    "num_rows": "i32",
    "num_zeroed": "i32",
    "ignore_index": "i32",
}
SUM = {
    "loss_rows_ptr": "*fp32",
    "correct_rows_ptr": "*i32",
    "num_targets_ptr": "*i64",
    "loss_ptr": "*fp32",
    "num_correct_ptr": "*i64",
    "num_rows": "i32",
}
SCALE = {"x_ptr": "*fp32", "scale_ptr": "*fp32", "num_elements": "i32"}


def test_no_spills():
    large = {"V": 50257, "PITCH": 50304, "BLOCK": 4096, "STAGES": 1}
    cases = [
        CompileCase("kernels.decode.rows", "decode_rows_kernel", ROWS, {**large, "WRITE_GRADIENT": True}, 8),
        CompileCase("kernels.decode.rows", "scale_kernel", SCALE, {"BLOCK": 4096, "PROGRAMS": 1024}, 8),
        CompileCase("kernels.decode.totals", "count_targets_kernel", COUNT, {"BLOCK": 8192}, 16),
        CompileCase("kernels.decode.totals", "sum_rows_kernel", SUM, {"BLOCK": 8192}, 16),
    ]
    check_compiled(cases)


def tiles(dtype, rows, columns):
    return f"tensordesc<{dtype}[{rows}, {columns}]>"


@pytest.mark.parametrize("in_slices", [False, True])
@pytest.mark.parametrize("weight_dtype", ["bf16", "fp32"])
def test_one_launch_has_no_spills_and_reads_through_descriptors(weight_dtype, in_slices):
    signature = {
        "hidden_by_row": tiles("bf16", 128, 64),
        "hidden_by_depth": tiles("bf16", 64, 256),
        "weight_by_row": tiles("bf16", 256, 64),
        "weight_by_depth": tiles("bf16", 64, 256),
        "logits_by_row": tiles("bf16", 128, 64),
        "logits_by_depth": tiles("bf16", 64, 128),
        "logits_ptr": "*bf16",
        "target_ptr": "*i64",
        "num_targets_ptr": "*i64",
        "loss_ptr": "*fp32",
        "correct_ptr": "*i32",
        "grad_hidden_ptr": "*bf16",
        "grad_weight_ptr": f"*{weight_dtype}",
        "counter_ptr": "*i32",
        "num_tokens": "i32",
        "chunk_rows": "i32",
        "slice_depth": "i32",
        "ignore_index": "i32",
    }
    constants = {"D": 1536, "V": 50257, "PITCH": 50304, "BM": 128, "BN": 256, "BK": 64}
    constants |= {"BLOCK": 4096, "ROW_STAGES": 2, "THREADS": 256, "SINGLE": False}
    if in_slices:
        signature["partial_ptr"] = "*fp32"
    else:
        constants["partial_ptr"] = None
    case = CompileCase("kernels.decode.one_launch", "decode_one_launch_kernel", signature, constants, 8, 3)
    (compiled,) = check_compiled([case], capabilities=(90,), read_code=True)
    assert compiled.machine_code.count("HGMMA.64x256x16") == 12
    assert compiled.machine_code.count("UTMALDG") == 18
