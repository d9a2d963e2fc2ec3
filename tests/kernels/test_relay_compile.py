"""The relay's kernels compile for the GPUs they are meant for, and nothing spills."""

from fused_checks import CompileCase, check_compiled

FORWARD = {
    "input_ptr": "*i64",
    "recent_ptr": "*i64",
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
SORT = {
    "input_ptr": "*i64",
    "recent_ptr": "*i64",
    "sorted_ptr": "*i32",
    "slot_ptr": "*i64",
    "num_slots": "i32",
    "num_sorted": "i32",
    "num_tokens": "i32",
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


def test_no_spills():
    taps = {"J": 4, "BLOCK_J": 4, "HAS_START": True}
    width = {"D": 1536, "BLOCK_D": 2048}
    cases = [
        CompileCase("kernels.relay.fused", "relay_forward_kernel", FORWARD, {**taps, **width}, 8),
        CompileCase("kernels.relay.history", "sort_history_kernel", SORT, {"J": 4, "PLACED": 32, "COMPARED": 256}, 4),
        CompileCase("kernels.relay.backward", "relay_sum_runs_kernel", SUM_RUNS, {**taps, **width, "SLOTS": 32}, 8),
        CompileCase(
            "kernels.relay.backward",
            "relay_join_runs_kernel",
            JOIN_RUNS,
            {**width, "SLOTS": 32, "PARTIALS": 8},
            8,
        ),
    ]
    for compiled in check_compiled(cases, read_code=True):
        assert "ATOM" not in compiled.machine_code
        assert "RED." not in compiled.machine_code
