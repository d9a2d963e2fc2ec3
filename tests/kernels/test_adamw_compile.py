"""AdamW's launches compile for the GPUs they are meant for, nothing spills, and numbers are read several at a time."""

from fused_checks import CompileCase, check_compiled

CORRECTIONS = {"table_ptr": "*i64", "correction_ptr": "*fp32", "skip_ptr": "*fp32", "num_params": "i32"}


def test_no_spills():
    constants = {"LOG_BETA1": -0.1, "LOG_BETA2": -0.05, "BLOCK": 64}
    check_compiled([CompileCase("kernels.adamw.fused", "adamw_corrections_kernel", CORRECTIONS, constants, 4)])


def test_gradients_of_either_precision_are_read_several_at_a_time():
    pointers = dict.fromkeys(("correction_ptr", "lr_ptr", "grad_scale_ptr", "skip_ptr"), "*fp32")
    signature = {"table_ptr": "*i64", "block_ptr": "*i32", **pointers, "first_block": "i32"}
    signature |= dict.fromkeys(("beta1", "beta2", "eps", "weight_decay"), "fp32")
    constants = dict.fromkeys(("HALF", "GRAD_HALF", "MOMENT"), "tl.bfloat16")
    cases = [
        CompileCase("kernels.adamw.fused", "adamw_kernel", signature, constants | {"BLOCK": 1024, "BLOCKS": blocks}, 4)
        for blocks in (8, 1)
    ]
    for compiled in check_compiled(cases, capabilities=(90,), read_code=True):
        # Four float32, four bfloat16, and what is left of those.
        for copy in ("LDGSTS.E.BYPASS.128", "LDGSTS.E.64", "LDG.E.U16"):
            assert copy in compiled.machine_code, copy
