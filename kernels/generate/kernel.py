"""The launch for several lanes: N tokens of B lanes, from relay to draw, without coming back to the host.

Layers are reached by arithmetic: three loops (cortex, memory, gated cortex) over blocks of equal size, in the order of
`layout.PackedBrain`, so one compiled kernel serves any depths. A phase begins by waiting for all programs and ends by
saying that its own part is there; what waits for nobody is done in between.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.barriers import arrive, wait
from kernels.generate.device import prefetch_rows, share, this_program
from kernels.generate.phases import (
    add_rows,
    cortex_in,
    fetch_memory,
    go_gates,
    lateral_input,
    memory_in,
    memory_inputs,
    memory_unit,
    swiglu_in,
)
from kernels.generate.sampling import all_ended, filtered_winner, race, record, relay_columns, winner


@triton.jit
def enter(p_counter, arrived, SINGLE: tl.constexpr):
    """Begin a phase, when as many arrivals have been counted, and return this program's number."""
    wait(p_counter, arrived, SINGLE)
    return this_program(SINGLE)


@triton.jit
def leave(
    p_counter, arrived, p_next, num_rows, pair_offset, unit, K: tl.constexpr, GROUPS: tl.constexpr,
    LINES: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """End a phase, ask for the beginning of the matrix that is read next, and return what to wait for before that."""
    arrive(p_counter, SINGLE)
    prefetch_rows(this_program(SINGLE), p_next, num_rows, pair_offset, unit, K, GROUPS, LINES)
    return arrived + tl.num_programs(0)


@triton.jit
def mlp(
    p_x, p_x_columns, p_hidden, p_square, p_matrix, p_next, next_rows, next_pair, next_unit, num_lanes, p_counter,
    arrived,
    D: tl.constexpr, M: tl.constexpr, EPS: tl.constexpr, GROUPS: tl.constexpr, BQ: tl.constexpr, BL: tl.constexpr,
    BR_MLP: tl.constexpr, NB_MLP: tl.constexpr, KS_MLP: tl.constexpr, ST_MLP: tl.constexpr,
    BR_OUT: tl.constexpr, NB_OUT: tl.constexpr, KS_OUT: tl.constexpr, ST_OUT: tl.constexpr,
    LINES: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """x += W_out (silu(g) u); p_next is the matrix that is read after it."""
    program = enter(p_counter, arrived, SINGLE)
    swiglu_in(
        program, p_x_columns, p_square, p_hidden, p_matrix, num_lanes,
        D, M, EPS, GROUPS, BQ, BL, BR_MLP, NB_MLP, KS_MLP, ST_MLP,
    )  # fmt: skip
    p_out = p_matrix + 2 * M * D
    arrived = leave(p_counter, arrived, p_out, D, 0, 1, M, GROUPS, LINES, SINGLE)
    program = enter(p_counter, arrived, SINGLE)
    add_rows(
        program, p_hidden, p_square, p_square, False, p_x, p_x, p_x, p_x_columns, p_square, p_out, num_lanes,
        D, M, D, 0, 0, False, False, EPS, GROUPS, BL, BR_OUT, NB_OUT, KS_OUT, ST_OUT,
    )  # fmt: skip
    return leave(p_counter, arrived, p_next, next_rows, next_pair, next_unit, D, 1, LINES, SINGLE)


@triton.jit
def cortex_layer(
    p_x, p_x_columns, p_columns, p_spikes, p_share, p_square, p_go, p_go_vector, p_state, p_matrix, p_vector,
    p_lengths, step, num_lanes, make_go, gated, p_counter, arrived,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, GO: tl.constexpr, GRADED: tl.constexpr, THETA: tl.constexpr,
    BETA: tl.constexpr, RHO: tl.constexpr, EPS: tl.constexpr, GROUPS: tl.constexpr, BQ: tl.constexpr,
    BL: tl.constexpr, BD: tl.constexpr,
    BR_PAIR: tl.constexpr, NB_PAIR: tl.constexpr, KS_PAIR: tl.constexpr, ST_PAIR: tl.constexpr,
    BR_OUT: tl.constexpr, NB_OUT: tl.constexpr, KS_OUT: tl.constexpr, ST_OUT: tl.constexpr,
    LINES: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """x += W_out (rms_per_column(s) silu(z) go), s the spikes that W_in rms(x) makes."""
    EXACT: tl.constexpr = p_matrix.dtype.element_ty == tl.float32
    program = this_program(SINGLE)
    tile, _ = share(program, D, BR_PAIR, 1)
    lateral = lateral_input(
        program, p_state + 2 * num_lanes * D, p_vector, tile, D, num_lanes, D, C, BL, BR_PAIR, EXACT
    )  # of the first tile: with no more tiles than programs, the only one
    program = enter(p_counter, arrived, SINGLE)
    cortex_in(
        program, lateral, p_x_columns, p_square, p_columns, p_share, p_spikes, p_state, p_matrix, p_vector, p_lengths,
        step, num_lanes,
        D, C, GRADED, THETA, BETA, RHO, EPS, GROUPS, BQ, BL, BR_PAIR, NB_PAIR, KS_PAIR, ST_PAIR, EXACT,
    )  # fmt: skip
    if GO:  # noqa: SIM102, one is decided when compiled
        if make_go:
            go_gates(program, p_x, p_go, p_go_vector, num_lanes, D, D // C, EPS, BD)
    p_out = p_matrix + 2 * D * D
    arrived = leave(p_counter, arrived, p_out, D, 0, 1, D, GROUPS, LINES, SINGLE)
    program = enter(p_counter, arrived, SINGLE)
    add_rows(
        program, p_columns, p_share, p_go, gated, p_spikes, p_state + 2 * num_lanes * D, p_x, p_x_columns, p_square,
        p_out, num_lanes,
        D, D, C, C, BR_PAIR, GO, True, EPS, GROUPS, BL, BR_OUT, NB_OUT, KS_OUT, ST_OUT,
    )  # fmt: skip
    return leave(p_counter, arrived, p_matrix + 3 * D * D, M, M * D, 1, D, 1, LINES, SINGLE)


@triton.jit
def memory_layer(
    p_x, p_x_columns, p_columns, p_inner, p_share, p_square, p_state, p_matrix, p_vector,
    p_lengths, step, num_lanes, p_counter, arrived,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DELTA: tl.constexpr, EPS: tl.constexpr, GROUPS: tl.constexpr,
    BQ: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, CU: tl.constexpr,
    BR_MEMORY: tl.constexpr, NB_MEMORY: tl.constexpr, KS_MEMORY: tl.constexpr, ST_MEMORY: tl.constexpr,
    BR_OUT: tl.constexpr, NB_OUT: tl.constexpr, KS_OUT: tl.constexpr, ST_OUT: tl.constexpr,
    LINES: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """x += W_out (rms_per_head(what is read) silu(gate)), after writing the fast weights."""
    program = enter(p_counter, arrived, SINGLE)
    memory_in(
        program, p_x_columns, p_square, p_inner, p_matrix, num_lanes,
        D, EPS, GROUPS, BQ, BL, BR_MEMORY, NB_MEMORY, KS_MEMORY, ST_MEMORY,
    )  # fmt: skip
    p_out = p_matrix + 4 * D * D
    # Fast weights are what the memory moves next; the matrix behind them would not stay in L2.
    arrived = leave(p_counter, arrived, p_out, D, 0, 1, D, GROUPS, 0, SINGLE)
    num_units = num_lanes * (D // CU)
    unit = this_program(SINGLE)
    weight, forget, write = fetch_memory(unit, p_x, p_state, p_vector, num_units, D, N, DELTA, EPS, BD, CU)
    wait(p_counter, arrived, SINGLE)
    while unit < num_units:
        # The next unit's weights are on their way while this one's are worked on.
        following = unit + tl.num_programs(0)
        q, k, v, gate = memory_inputs(unit, p_inner, D, N, CU)
        next_weight, next_forget, next_write = fetch_memory(
            following, p_x, p_state, p_vector, num_units, D, N, DELTA, EPS, BD, CU
        )
        memory_unit(
            unit, weight, forget, write, q, k, v, gate, p_columns, p_share, p_state, p_lengths, step,
            D, N, DELTA, EPS, CU, BL,
        )  # fmt: skip
        unit, weight, forget, write = following, next_weight, next_forget, next_write
    arrived = leave(p_counter, arrived, p_out, D, 0, 1, D, GROUPS, LINES, SINGLE)
    program = enter(p_counter, arrived, SINGLE)
    add_rows(
        program, p_columns, p_share, p_share, False, p_x, p_x, p_x, p_x_columns, p_square, p_out, num_lanes,
        D, D, D, N, CU, False, False, EPS, GROUPS, BL, BR_OUT, NB_OUT, KS_OUT, ST_OUT,
    )  # fmt: skip
    return leave(p_counter, arrived, p_matrix + 5 * D * D, M, M * D, 1, D, 1, LINES, SINGLE)


@triton.jit(do_not_specialize=["num_lanes", "num_wernicke", "num_memory", "num_broca", "seed_low", "seed_high", "top_k",
                               "limit", "num_ids", "num_stop"])  # fmt: skip
def generate_kernel(
    p_embedding, p_decoder, p_matrices, p_vectors,
    p_ids, p_log_probs, p_lengths, p_seen, p_stop, p_lanes, p_positions, p_cortex, p_memory,
    p_x, p_x_columns, p_columns, p_hidden, p_inner, p_share, p_square, p_go, p_candidate, p_candidate_id, p_logits,
    p_counter,
    num_lanes, num_wernicke, num_memory, num_broca, num_ids, num_stop, limit, seed_low, seed_high,
    temperature, penalty, top_p, log_min_p, top_k,
    D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, M: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr,
    GRADED: tl.constexpr, DELTA: tl.constexpr, GO: tl.constexpr, THETA: tl.constexpr, BETA: tl.constexpr,
    RHO: tl.constexpr, EPS: tl.constexpr,
    GREEDY: tl.constexpr, PENALTY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    BL: tl.constexpr, GROUPS: tl.constexpr, CU: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, LINES: tl.constexpr,
    BR_PAIR: tl.constexpr, NB_PAIR: tl.constexpr, KS_PAIR: tl.constexpr, ST_PAIR: tl.constexpr,
    BR_OUT: tl.constexpr, NB_OUT: tl.constexpr, KS_OUT: tl.constexpr, ST_OUT: tl.constexpr,
    BR_MEMORY: tl.constexpr, NB_MEMORY: tl.constexpr, KS_MEMORY: tl.constexpr, ST_MEMORY: tl.constexpr,
    BR_MLP: tl.constexpr, NB_MLP: tl.constexpr, KS_MLP: tl.constexpr, ST_MLP: tl.constexpr,
    BR_DECODE: tl.constexpr, NB_DECODE: tl.constexpr, KS_DECODE: tl.constexpr, ST_DECODE: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """Read the token at ids[b, TAPS - 1], draw the next, and so on until `limit` tokens are drawn or all lanes ended.

    ids `[B, num_ids]` begins with the TAPS - 1 recent ids and the first token; drawn tokens follow. lengths `[B]` is 0
    until a lane meets a stop token, whose state is then held. Scratch: x `[B, D]`, x_columns and columns `[B, D]`,
    hidden `[B, M]`, inner `[B, 4D]`, share `[D / min(BR_PAIR, CU), BL]`, square `[P, BL]`, go `[B, K]`, candidate
    `[4, P, B]`, candidate_id `[P, B]`, logits `[3, B, V]` with a filter, counter `[1]`.
    """
    FILTER: tl.constexpr = (TOP_K or TOP_P or MIN_P) and not GREEDY
    cortex_size: tl.constexpr = 3 * D * D + 3 * M * D
    memory_size: tl.constexpr = 5 * D * D + 3 * M * D
    cortex_vectors: tl.constexpr = (D * (C + 2) + 63) // 64 * 64
    memory_vectors: tl.constexpr = ((2 if DELTA else 1) * (D // N) * (D + 1) + 63) // 64 * 64
    p_go_vector = p_vectors + (num_wernicke + num_broca) * cortex_vectors + num_memory * memory_vectors
    p_taps = p_go_vector + (((D // C) * (D + 1) + 63) // 64 * 64 if GO else 0)
    num_layers = num_wernicke + num_memory + num_broca
    # What is read first: a memory's 4D rows, a cortex's D pairs, or the decoder.
    first_is_memory = (num_wernicke == 0) & (num_memory > 0)
    first_rows = tl.where(num_layers == 0, V, tl.where(first_is_memory, 4 * D, D))
    first_pair = tl.where((num_layers == 0) | first_is_memory, 0, D * D)
    first_unit = tl.where((num_layers == 0) | first_is_memory, 1, BR_PAIR)
    p_first = p_matrices
    if num_layers == 0:
        p_first = p_decoder

    lane = tl.program_id(0)
    while lane < num_lanes:
        first = tl.load(p_ids + lane * num_ids + TAPS - 1)
        relay_columns(
            lane, first, 0, p_ids, num_ids, p_embedding, p_taps, p_x, p_x_columns, p_square, D, TAPS, EPS, BD, BP, BL,
        )  # fmt: skip
        lane += tl.num_programs(0)
    arrived = tl.full([], 0, tl.int32)
    arrived = leave(p_counter, arrived, p_first, first_rows, first_pair, first_unit, D, 1, LINES, SINGLE)

    step = tl.full([], 0, tl.int32)
    while step < limit:
        p_matrix, p_vector, p_spiking, p_fast = p_matrices, p_vectors, p_cortex, p_memory
        layer = tl.full([], 0, tl.int32)
        while layer < num_layers:
            in_broca = layer >= num_wernicke + num_memory
            is_last = layer + 1 == num_layers
            next_is_memory = (layer + 1 >= num_wernicke) & (layer + 1 < num_wernicke + num_memory)
            next_rows = tl.where(is_last, V, tl.where(next_is_memory, 4 * D, D))
            next_pair = tl.where(is_last | next_is_memory, 0, D * D)
            next_unit = tl.where(is_last | next_is_memory, 1, BR_PAIR)
            if layer >= num_wernicke and not in_broca:
                arrived = memory_layer(
                    p_x, p_x_columns, p_columns, p_inner, p_share, p_square, p_fast, p_matrix, p_vector,
                    p_lengths, step, num_lanes, p_counter, arrived,
                    D, M, N, DELTA, EPS, GROUPS, BQ, BL, BD, CU,
                    BR_MEMORY, NB_MEMORY, KS_MEMORY, ST_MEMORY, BR_OUT, NB_OUT, KS_OUT, ST_OUT, LINES, SINGLE,
                )  # fmt: skip
                p_mlp = p_matrix + 5 * D * D
                p_matrix += memory_size
                p_vector += memory_vectors
                p_fast += tl.cast(num_lanes, tl.int64) * D * N
            else:
                make_go = layer == num_wernicke + num_memory
                arrived = cortex_layer(
                    p_x, p_x_columns, p_columns, p_inner, p_share, p_square, p_go, p_go_vector, p_spiking, p_matrix,
                    p_vector, p_lengths, step, num_lanes, make_go, in_broca, p_counter, arrived,
                    D, M, C, GO, GRADED, THETA, BETA, RHO, EPS, GROUPS, BQ, BL, BD,
                    BR_PAIR, NB_PAIR, KS_PAIR, ST_PAIR, BR_OUT, NB_OUT, KS_OUT, ST_OUT, LINES, SINGLE,
                )  # fmt: skip
                p_mlp = p_matrix + 3 * D * D
                p_matrix += cortex_size
                p_vector += cortex_vectors
                p_spiking += 3 * num_lanes * D
            p_next = p_matrix
            if is_last:
                p_next = p_decoder
            arrived = mlp(
                p_x, p_x_columns, p_hidden, p_square, p_mlp, p_next, next_rows, next_pair, next_unit, num_lanes,
                p_counter, arrived,
                D, M, EPS, GROUPS, BQ, BL, BR_MLP, NB_MLP, KS_MLP, ST_MLP, BR_OUT, NB_OUT, KS_OUT, ST_OUT,
                LINES, SINGLE,
            )  # fmt: skip
            layer += 1

        program = enter(p_counter, arrived, SINGLE)
        race(
            program, p_x_columns, p_square, p_decoder, p_seen, p_lanes, p_positions, p_candidate, p_candidate_id,
            p_logits, step, num_lanes, seed_low, seed_high, temperature, penalty,
            D, V, GREEDY, PENALTY, FILTER, EPS, GROUPS, BQ, BL, BR_DECODE, NB_DECODE, KS_DECODE, ST_DECODE, LINES,
        )  # fmt: skip
        arrived = leave(p_counter, arrived, p_first, first_rows, first_pair, first_unit, D, 1, LINES, SINGLE)
        lane = enter(p_counter, arrived, SINGLE)
        unknown_zero = lane - tl.program_id(0)
        while lane < num_lanes:
            token, raw, log_sum = winner(lane, p_candidate, p_candidate_id, num_lanes, BP, SINGLE)
            if FILTER:
                token, raw = filtered_winner(
                    lane, p_logits, num_lanes, top_k, top_p, log_min_p, V, TOP_K, TOP_P, MIN_P, BV
                )
            token = record(
                lane, token, raw - log_sum, step, tl.load(p_lengths + lane, cache_modifier=".cg"),
                tl.load(p_ids + lane * num_ids + step + TAPS - 1, cache_modifier=".cg"), p_ids,
                p_log_probs, p_lengths, p_seen, p_stop, num_ids, num_stop, limit, V, TAPS, PENALTY, BS,
            )  # fmt: skip
            relay_columns(
                lane, token, step + 1, p_ids, num_ids, p_embedding, p_taps + unknown_zero, p_x, p_x_columns, p_square,
                D, TAPS, EPS, BD, BP, BL,
            )  # fmt: skip
            lane += tl.num_programs(0)
        arrived = leave(p_counter, arrived, p_first, first_rows, first_pair, first_unit, D, 1, 0, SINGLE)
        step += 1
        if num_stop > 0:
            wait(p_counter, arrived, SINGLE)
            if all_ended(p_lengths, num_lanes, step - 1, BL):
                step = limit
