"""The launch itself: N tokens of B lanes, from relay to draw, without coming back to the host.

Layers are reached by arithmetic: three loops (cortex, memory, gated cortex) over blocks of equal size, in the order of
`layout.PackedBrain`, so one compiled kernel serves any depths.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.device import grid_barrier, prefetch_rows
from kernels.generate.phases import (
    cortex_in,
    cortex_out,
    fetch_memory,
    go_gates,
    memory_unit,
    plain_rows,
    swiglu_in,
)
from kernels.generate.sampling import all_ended, filtered_winner, race, record, relay_lane, winner


@triton.jit
def mlp(
    p_x, p_hidden, p_matrix, p_next, next_rows, next_pair, num_lanes, p_counter,
    D: tl.constexpr, M: tl.constexpr, EPS: tl.constexpr, BL: tl.constexpr, BR_MLP: tl.constexpr, BR_OUT: tl.constexpr,
    BK: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """x += W_out (silu(g) u); p_next is the matrix that is read after it."""
    swiglu_in(p_x, p_hidden, p_matrix, num_lanes, D, M, EPS, BL, BR_MLP, BK, DOT, STAGES)
    p_out = p_matrix + 2 * M * D
    prefetch_rows(p_out, D, 0, M, 1, LINES)
    grid_barrier(p_counter, SINGLE)
    plain_rows(p_hidden, p_x, p_out, D, num_lanes, M, False, True, EPS, BL, BR_OUT, BM, DOT, STAGES)
    prefetch_rows(p_next, next_rows, next_pair, D, 1, LINES)
    grid_barrier(p_counter, SINGLE)


@triton.jit
def cortex_layer(
    p_x, p_inner, p_hidden, p_go, p_go_vector, p_state, p_matrix, p_vector, p_next, next_rows, next_pair,
    p_lengths, step, num_lanes, make_go, gated, p_counter,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, GO: tl.constexpr, GRADED: tl.constexpr, THETA: tl.constexpr,
    BETA: tl.constexpr, RHO: tl.constexpr, EPS: tl.constexpr, BL: tl.constexpr, BR_PAIR: tl.constexpr,
    BR_MLP: tl.constexpr, BR_OUT: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    p_gates = p_inner + num_lanes * D
    cortex_in(
        p_x, p_inner, p_gates, p_state, p_matrix, p_vector, p_lengths, step, num_lanes,
        D, C, GRADED, THETA, BETA, RHO, EPS, BL, BR_PAIR, BK, DOT, STAGES,
    )  # fmt: skip
    if GO:  # noqa: SIM102, one is decided when compiled
        if make_go:
            go_gates(p_x, p_go, p_go_vector, num_lanes, D, D // C, EPS, BD)
    p_out = p_matrix + 2 * D * D
    prefetch_rows(p_out, D, 0, D, 1, LINES)
    grid_barrier(p_counter, SINGLE)
    cortex_out(
        p_x, p_inner, p_gates, p_go, p_state, p_out, num_lanes, gated, D, C, GO, EPS, BL, BR_OUT, BK, DOT, STAGES
    )
    p_mlp = p_matrix + 3 * D * D
    prefetch_rows(p_mlp, M, M * D, D, 1, LINES)
    grid_barrier(p_counter, SINGLE)
    mlp(
        p_x, p_hidden, p_mlp, p_next, next_rows, next_pair, num_lanes, p_counter,
        D, M, EPS, BL, BR_MLP, BR_OUT, BK, BM, DOT, STAGES, LINES, SINGLE,
    )  # fmt: skip


@triton.jit
def memory_layer(
    p_x, p_inner, p_y, p_hidden, p_state, p_matrix, p_vector, p_next, next_rows, next_pair,
    p_lengths, step, num_lanes, p_counter,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DELTA: tl.constexpr, EPS: tl.constexpr, BL: tl.constexpr,
    BR_MEMORY: tl.constexpr, BR_MLP: tl.constexpr, BR_OUT: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = D // N
    num_units = num_lanes * H
    plain_rows(p_x, p_inner, p_matrix, 4 * D, num_lanes, D, True, False, EPS, BL, BR_MEMORY, BK, DOT, STAGES)
    unit = tl.program_id(0)
    weight, forget, write = fetch_memory(unit, p_x, p_state, p_vector, num_units, D, H, N, DELTA, EPS, BD)
    grid_barrier(p_counter, SINGLE)
    while unit < num_units:
        memory_unit(unit, weight, forget, write, p_inner, p_y, p_state, p_lengths, step, D, H, N, DELTA, EPS)
        unit += tl.num_programs(0)
        if unit < num_units:
            weight, forget, write = fetch_memory(unit, p_x, p_state, p_vector, num_units, D, H, N, DELTA, EPS, BD)
    p_out = p_matrix + 4 * D * D
    prefetch_rows(p_out, D, 0, D, 1, LINES)
    grid_barrier(p_counter, SINGLE)
    plain_rows(p_y, p_x, p_out, D, num_lanes, D, False, True, EPS, BL, BR_OUT, BK, DOT, STAGES)
    p_mlp = p_matrix + 5 * D * D
    prefetch_rows(p_mlp, M, M * D, D, 1, LINES)
    grid_barrier(p_counter, SINGLE)
    mlp(
        p_x, p_hidden, p_mlp, p_next, next_rows, next_pair, num_lanes, p_counter,
        D, M, EPS, BL, BR_MLP, BR_OUT, BK, BM, DOT, STAGES, LINES, SINGLE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_lanes", "num_wernicke", "num_memory", "num_broca", "seed_low", "seed_high", "top_k",
                               "limit", "num_ids", "num_stop"])  # fmt: skip
def generate_kernel(
    p_embedding, p_decoder, p_matrices, p_vectors,
    p_ids, p_log_probs, p_lengths, p_seen, p_stop, p_lanes, p_positions, p_cortex, p_memory,
    p_x, p_inner, p_y, p_hidden, p_go, p_candidate, p_candidate_id, p_logits, p_counter,
    num_lanes, num_wernicke, num_memory, num_broca, num_ids, num_stop, limit, seed_low, seed_high,
    temperature, penalty, top_p, log_min_p, top_k,
    D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, M: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr,
    GRADED: tl.constexpr, DELTA: tl.constexpr, GO: tl.constexpr, THETA: tl.constexpr, BETA: tl.constexpr,
    RHO: tl.constexpr, EPS: tl.constexpr,
    GREEDY: tl.constexpr, PENALTY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    BL: tl.constexpr, BR_PAIR: tl.constexpr, BR_MEMORY: tl.constexpr, BR_OUT: tl.constexpr, BR_MLP: tl.constexpr,
    BR_DECODE: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr,
    BS: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Read the token at ids[b, TAPS - 1], draw the next, and so on until `limit` tokens are drawn or all lanes ended.

    ids `[B, num_ids]` begins with the TAPS - 1 recent ids and the first token; drawn tokens follow. lengths `[B]` is 0
    until a lane meets a stop token, whose state is then held. Scratch: x, y `[B, D]`, inner `[B, 4D]`, hidden `[B, M]`,
    go `[B, K]`, candidate `[4, P, B]`, candidate_id `[P, B]`, logits `[3, B, V]` with a filter, counter `[1]`.
    """
    FILTER: tl.constexpr = (TOP_K or TOP_P or MIN_P) and not GREEDY
    # A single lane with nothing to filter: every program finds the winner and relays it by itself, a barrier less.
    SPREAD: tl.constexpr = BL > 1 or FILTER
    cortex_size: tl.constexpr = 3 * D * D + 3 * M * D
    memory_size: tl.constexpr = 5 * D * D + 3 * M * D
    cortex_vectors: tl.constexpr = (D * (C + 2) + 63) // 64 * 64
    memory_vectors: tl.constexpr = ((2 if DELTA else 1) * (D // N) * (D + 1) + 63) // 64 * 64
    p_go_vector = p_vectors + (num_wernicke + num_broca) * cortex_vectors + num_memory * memory_vectors
    p_taps = p_go_vector + (((D // C) * (D + 1) + 63) // 64 * 64 if GO else 0)
    num_layers = num_wernicke + num_memory + num_broca

    lane = tl.program_id(0)
    while lane < num_lanes:
        first = tl.load(p_ids + lane * num_ids + TAPS - 1)
        relay_lane(lane, first, 0, p_ids, num_ids, p_embedding, p_taps, p_x, D, TAPS, EPS, BD)
        lane += tl.num_programs(0)
    grid_barrier(p_counter, SINGLE)

    first_is_memory = (num_wernicke == 0) & (num_memory > 0)
    first_rows = tl.where(first_is_memory, 4 * D, D)
    first_pair = tl.where(first_is_memory, 0, D * D)
    step = tl.full([], 0, tl.int32)
    while step < limit:
        p_matrix, p_vector, p_spiking, p_fast = p_matrices, p_vectors, p_cortex, p_memory
        layer = tl.full([], 0, tl.int32)
        while layer < num_layers:
            in_broca = layer >= num_wernicke + num_memory
            # What is read after this layer: a memory's 4D rows, a cortex's D pairs, or the decoder.
            is_last = layer + 1 == num_layers
            next_is_memory = (layer + 1 >= num_wernicke) & (layer + 1 < num_wernicke + num_memory)
            next_rows = tl.where(is_last, V, tl.where(next_is_memory, 4 * D, D))
            next_pair = tl.where(is_last | next_is_memory, 0, D * D)
            if layer >= num_wernicke and not in_broca:
                p_next = p_matrix + memory_size
                if is_last:
                    p_next = p_decoder
                memory_layer(
                    p_x, p_inner, p_y, p_hidden, p_fast, p_matrix, p_vector, p_next, next_rows, next_pair,
                    p_lengths, step, num_lanes, p_counter,
                    D, M, N, DELTA, EPS, BL, BR_MEMORY, BR_MLP, BR_OUT, BK, BM, BD, DOT, STAGES, LINES, SINGLE,
                )  # fmt: skip
                p_matrix += memory_size
                p_vector += memory_vectors
                p_fast += tl.cast(num_lanes, tl.int64) * D * N
            else:
                p_next = p_matrix + cortex_size
                if is_last:
                    p_next = p_decoder
                make_go = layer == num_wernicke + num_memory
                cortex_layer(
                    p_x, p_inner, p_hidden, p_go, p_go_vector, p_spiking, p_matrix, p_vector, p_next, next_rows,
                    next_pair, p_lengths, step, num_lanes, make_go, in_broca, p_counter,
                    D, M, C, GO, GRADED, THETA, BETA, RHO, EPS, BL, BR_PAIR, BR_MLP, BR_OUT, BK, BM, BD, DOT,
                    STAGES, LINES, SINGLE,
                )  # fmt: skip
                p_matrix += cortex_size
                p_vector += cortex_vectors
                p_spiking += 3 * num_lanes * D
            layer += 1

        race(
            p_x, p_decoder, p_seen, p_lanes, p_positions, p_candidate, p_candidate_id, p_logits, step, num_lanes,
            seed_low, seed_high, temperature, penalty,
            D, V, GREEDY, PENALTY, FILTER, EPS, BL, BR_DECODE, BK, DOT, STAGES,
        )  # fmt: skip
        prefetch_rows(p_matrices, first_rows, first_pair, D, 1, LINES)
        grid_barrier(p_counter, SINGLE)
        lane = tl.program_id(0) * (1 if SPREAD else 0)
        while lane < num_lanes:
            token, raw, log_sum = winner(lane, p_candidate, p_candidate_id, num_lanes, BP)
            if FILTER:
                token, raw = filtered_winner(
                    lane, p_logits, num_lanes, top_k, top_p, log_min_p, V, TOP_K, TOP_P, MIN_P, BV
                )
            token = record(
                lane, token, raw - log_sum, step, p_ids, p_log_probs, p_lengths, p_seen, p_stop, num_ids, num_stop,
                limit, V, TAPS, PENALTY, BS,
            )  # fmt: skip
            relay_lane(lane, token, step + 1, p_ids, num_ids, p_embedding, p_taps, p_x, D, TAPS, EPS, BD)
            lane += tl.num_programs(0) if SPREAD else 1
        grid_barrier(p_counter, SINGLE or not SPREAD)
        step += 1
        if num_stop > 0 and all_ended(p_lengths, num_lanes, step - 1, BL):
            step = limit
