"""The sampling kernels compile for the GPUs they are meant for, and nothing spills."""

from fused_checks import CompileCase, check_compiled

LOGITS = {
    "hidden_ptr": "*bf16",
    "weight_ptr": "*bf16",
    "seen_ptr": "*i1",
    "lane_ptr": "*i64",
    "position_ptr": "*i64",
    "logits_ptr": "*fp32",
    "num_lanes": "i32",
    "num_ids": "i32",
    "seed_low": "i32",
    "seed_high": "i32",
    "penalty": "fp32",
    "temperature": "fp32",
}
DRAW = {
    "logits_ptr": "*fp32",
    "token_ptr": "*i64",
    "log_prob_ptr": "*fp32",
    "num_lanes": "i32",
    "num_ids": "i32",
    "top_k": "i32",
    "top_p": "fp32",
    "log_min_p": "fp32",
}


def test_no_spills():
    tile = {"D": 1536, "PENALTY": True, "GREEDY": False, "BLOCK_V": 64, "BLOCK_K": 64, "BLOCK_B": 16}
    filters = {"TOP_K": True, "TOP_P": True, "MIN_P": True, "BLOCK": 8192}
    check_compiled([CompileCase("kernels.sample.fused", "sample_draw_kernel", DRAW, filters, 16)])
    logits = CompileCase("kernels.sample.fused", "sample_logits_kernel", LOGITS, tile, 4, 4)
    on_89, on_90 = check_compiled([logits], read_code=True)
    assert "HMMA" in on_89.machine_code
    assert "HGMMA" in on_90.machine_code
