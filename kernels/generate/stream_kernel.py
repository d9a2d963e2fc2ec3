"""The launch for few lanes: N tokens of B lanes, from relay to draw, without coming back to the host.

One loop runs over the tiles of `stream`, whichever phase they belong to, so that weights are asked for far ahead, past
barriers, layers and tokens. A phase begins by gathering its activations, which stay in registers, and ends with a
barrier.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.device import silu
from kernels.generate.phases import go_gates
from kernels.generate.sampling import all_ended, filtered_winner, race_logits, record, relay_columns, winner
from kernels.generate.stream import CORTEX_IN, DECODE, MEMORY_IN, MLP_OUT, OUT
from kernels.generate.stream_phases import (
    arrive,
    block_barrier,
    column_parts,
    fetch_memory,
    group_scale,
    load_columns,
    load_groups,
    load_squares,
    memory_unit,
    norm_scale,
    spike_update,
    store_columns,
    wait,
)


@triton.jit(do_not_specialize=["num_lanes", "num_wernicke", "num_memory", "num_broca", "seed_low", "seed_high", "top_k",
                               "limit", "num_ids", "num_stop", "num_tiles", "zero"])  # fmt: skip
def stream_kernel(
    p_embedding, d_tiles, p_vectors,
    p_ids, p_log_probs, p_lengths, p_seen, p_stop, p_lanes, p_positions, p_cortex, p_memory,
    p_x, p_x_columns, p_columns, p_hidden, p_inner, p_group, p_square, p_go, p_candidate, p_candidate_id, p_logits,
    p_counter, p_table,
    num_lanes, num_wernicke, num_memory, num_broca, num_ids, num_stop, limit, seed_low, seed_high,
    temperature, penalty, top_p, log_min_p, top_k, num_tiles, zero,
    D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, M: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr,
    GRADED: tl.constexpr, DELTA: tl.constexpr, GO: tl.constexpr, THETA: tl.constexpr, BETA: tl.constexpr,
    RHO: tl.constexpr, EPS: tl.constexpr,
    GREEDY: tl.constexpr, PENALTY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    BL: tl.constexpr, LN: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr,
    CU: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    BRACE: tl.constexpr, TOKENS: tl.constexpr, P: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Read the token at ids[b, TAPS - 1], draw the next, and so on until `limit` tokens are drawn or all lanes ended.

    ids `[B, num_ids]` begins with the TAPS - 1 recent ids and the first token; drawn tokens follow. lengths `[B]` is 0
    until a lane meets a stop token, whose state is then held. Scratch: x and group `[B, D]`, inner `[B, 4D]`, x_columns
    and columns `[BL, D]`, hidden `[BL, M]`, square `[P, LN]`, go `[B, K]`, candidate `[4, P, B]`, candidate_id
    `[P, B]`, logits `[B, V]` or with a filter `[3, B, V]`, counter `[1]`.
    """
    FILTER: tl.constexpr = (TOP_K or TOP_P or MIN_P) and not GREEDY
    # A single lane with nothing to filter: every program finds the winner and relays it by itself, a barrier less.
    SPREAD: tl.constexpr = LN > 1 or FILTER
    cortex_vectors: tl.constexpr = (D * (C + 2) + 63) // 64 * 64
    memory_vectors: tl.constexpr = ((2 if DELTA else 1) * (D // N) * (D + 1) + 63) // 64 * 64
    type: tl.constexpr = p_embedding.dtype.element_ty
    p_go_vector = p_vectors + (num_wernicke + num_broca) * cortex_vectors + num_memory * memory_vectors
    p_taps = p_go_vector + (((D // C) * (D + 1) + 63) // 64 * 64 if GO else 0)
    num_units = num_lanes * (D // CU)

    lane = tl.program_id(0) * (1 if SPREAD else 0)
    while lane < num_lanes:
        first = tl.load(p_ids + lane * num_ids + TAPS - 1)
        relay_columns(
            lane, first, 0, p_ids, num_ids, p_embedding, p_taps, p_x, p_x_columns, p_square, D, TAPS, EPS, BD, BP, LN,
            SPLIT,
        )  # fmt: skip
        lane += P if SPREAD else 1
    arrived = tl.full([], 0, tl.int32)
    arrive(p_counter, SINGLE)
    arrived += P
    wait(p_counter, arrived, SINGLE)

    o_r, o_l = tl.arange(0, R), tl.arange(0, LN)
    _, column_chunk, _ = column_parts(BL, LN, SPLIT)
    p_table += tl.program_id(0) * num_tiles * 2
    step = tl.full([], 0, tl.int32)
    while step < limit:
        x = tl.zeros([NB, KS, BL], type)
        scale = tl.full([NB, BL], 1.0, tl.float32)
        row_scale = tl.full([LN], 1.0, tl.float32)
        acc = tl.zeros([NB, R, BL], tl.float32)
        held = tl.zeros([R, LN], tl.float32)
        before, new = tl.zeros([R, LN], tl.float32), tl.zeros([R, LN], tl.float32)
        square = tl.zeros([LN], tl.float32)

        # Words of the table are read two tiles before they are needed. (A loop that hands a value on unchanged is not
        # pipelined, so a zero is added that the compiler does not know.)
        ahead = tl.where(num_tiles > 1, 1, 0)
        place = ahead
        fetch, next_fetch = tl.load(p_table), tl.load(p_table + 2 * ahead)
        use, next_use = tl.load(p_table + 1), tl.load(p_table + 1 + 2 * place)
        for _tile in tl.range(0, tl.minimum(limit - step, TOKENS) * num_tiles, num_stages=STAGES):
            w = tl.reshape(d_tiles.load([fetch.to(tl.int32), 0, 0, 0]), [NB, R, KS])
            fetch = next_fetch + zero
            ahead = tl.where(ahead + 1 == num_tiles, 0, ahead + 1)
            next_fetch = tl.load(p_table + 2 * ahead)

            tile = use
            use = next_use + zero
            place = tl.where(place + 1 == num_tiles, 0, place + 1)
            next_use = tl.load(p_table + 1 + 2 * place)
            flags = tile.to(tl.int32)
            kind = (flags >> 4) & 7
            chunk = (flags >> 8) & 63
            layer = ((tile >> 24) & 4095).to(tl.int32)
            is_memory = (layer >= num_wernicke) & (layer < num_wernicke + num_memory)

            o_n = (tile >> 36).to(tl.int32) + o_r
            rows = o_r < ((flags >> 14) & 1023)
            mask = rows[:, None] & (o_l < num_lanes)[None, :]
            if chunk == 0:
                acc = tl.zeros([NB, R, BL], tl.float32)
                # What the sums will be added to is asked for before the activations, not after the products.
                adds = mask & ((kind == OUT) | (kind == MLP_OUT))
                before = tl.load(p_x + o_l[None, :] * D + o_n[:, None], mask=adds, other=0.0, cache_modifier=".cg")
                adds = adds & (kind == OUT)
                new = tl.load(p_group + o_l[None, :] * D + o_n[:, None], mask=adds, other=0.0, cache_modifier=".cg")

            if flags & 1:
                K = tl.where(kind == MLP_OUT, M, D)
                p_in = p_x_columns
                if kind == MLP_OUT:
                    p_in = p_hidden
                if kind == OUT:
                    p_in = p_columns
                # All loads first, then what is made of them.
                normed = (kind != OUT) & (kind != MLP_OUT)
                squares = load_squares(p_square, num_lanes, normed, BP, LN)
                x = load_columns(p_in, K, num_lanes, NB, KS, BL, LN, SPLIT)
                if kind == OUT:
                    values = load_groups(p_group, num_lanes, D, NB, KS, BL, LN, SPLIT)
                    if is_memory:
                        scale = group_scale(values, p_go, False, num_lanes, N, D, C, False, EPS, NB, KS, BL, LN, SPLIT)
                    else:
                        gated = layer >= num_wernicke + num_memory
                        scale = group_scale(values, p_go, gated, num_lanes, C, D, C, GO, EPS, NB, KS, BL, LN, SPLIT)
                else:
                    scale = tl.full([NB, BL], 1.0, tl.float32)
                row_scale = norm_scale(squares, normed, D, EPS)
                square = tl.zeros([LN], tl.float32)
                if GO:  # noqa: SIM102, one is decided when compiled
                    if (kind == CORTEX_IN) & (layer == num_wernicke + num_memory):
                        go_gates(p_x, p_go, p_go_vector, num_lanes, D, D // C, EPS, BD)

            # Of all columns' products with this chunk of weights, those of its own activations count.
            counts = (column_chunk == chunk).to(tl.float32)
            acc += tl.dot(w, x, input_precision="ieee") * counts[None, None, :]

            if flags & 2:
                out = acc * scale[:, None, :]
                out = tl.sum(tl.sum(tl.reshape(out, [NB, R, LN, BL // LN]), 3), 0)
                cortex_before = tl.minimum(layer, num_wernicke) + tl.maximum(layer - num_wernicke - num_memory, 0)
                memory_before = tl.minimum(tl.maximum(layer - num_wernicke, 0), num_memory)
                p_vector = p_vectors + cortex_before * cortex_vectors + memory_before * memory_vectors
                p_state = p_cortex + cortex_before * (3 * num_lanes * D)
                p_fast = p_memory + memory_before.to(tl.int64) * (num_lanes * D * N)
                half = (flags >> 3) & 1
                if (kind == OUT) | (kind == MLP_OUT):
                    # The new spikes become the state's, now that nobody reads the old ones.
                    p_n = o_l[None, :] * D + o_n[:, None]
                    tl.store(p_state + 2 * num_lanes * D + p_n, new, mask=mask & (kind == OUT) & (not is_memory))
                    out += before
                    tl.store(p_x + p_n, out, mask=mask)
                    store_columns(p_x_columns, out, o_n, rows, num_lanes, D, LN, SPLIT)
                    square += tl.sum(tl.where(mask, out * out, 0.0), 0)
                    if flags & 4:
                        tl.store(p_square + tl.program_id(0) * LN + o_l, square)
                else:
                    out *= row_scale[None, :]
                    if kind == MEMORY_IN:
                        tl.store(p_inner + o_l[None, :] * (4 * D) + o_n[:, None], out, mask=mask)
                    elif kind == DECODE:
                        tl.store(p_logits + o_l[None, :] * V + o_n[:, None], out, mask=mask)
                    elif kind == CORTEX_IN:
                        if half == 0:
                            held = spike_update(
                                out, o_n, rows, p_state, p_vector, p_group, p_lengths, step, num_lanes,
                                D, C, GRADED, THETA, BETA, RHO, LN,
                            )  # fmt: skip
                        else:
                            store_columns(p_columns, held * silu(out), o_n, rows, num_lanes, D, LN, SPLIT)
                    else:
                        if half == 0:
                            held = silu(out)
                        else:
                            store_columns(p_hidden, held * out, o_n, rows, num_lanes, M, LN, SPLIT)

                if flags & 4:
                    if kind == DECODE:
                        block_barrier(SINGLE)
                        race_logits(
                            p_seen, p_lanes, p_positions, p_candidate, p_candidate_id, p_logits, step, num_lanes,
                            seed_low, seed_high, temperature, penalty, V, GREEDY, PENALTY, FILTER, LN, BRACE, R,
                        )  # fmt: skip
                        arrive(p_counter, SINGLE)
                        arrived += P
                        wait(p_counter, arrived, SINGLE)
                        lane = tl.program_id(0) * (1 if SPREAD else 0)
                        while lane < num_lanes:
                            token, raw, log_sum = winner(lane, p_candidate, p_candidate_id, num_lanes, BP, SINGLE)
                            if FILTER:
                                token, raw = filtered_winner(
                                    lane,
                                    p_logits,
                                    num_lanes,
                                    top_k,
                                    top_p,
                                    log_min_p,
                                    V,
                                    TOP_K,
                                    TOP_P,
                                    MIN_P,
                                    BV,
                                    False,
                                )
                            token = record(
                                lane, token, raw - log_sum, step, tl.load(p_lengths + lane, cache_modifier=".cg"),
                                tl.load(p_ids + lane * num_ids + step + TAPS - 1, cache_modifier=".cg"), p_ids,
                                p_log_probs, p_lengths, p_seen, p_stop, num_ids, num_stop, limit, V, TAPS, PENALTY, BS,
                            )  # fmt: skip
                            relay_columns(
                                lane, token, step + 1, p_ids, num_ids, p_embedding, p_taps, p_x, p_x_columns, p_square,
                                D, TAPS, EPS, BD, BP, LN, SPLIT,
                            )  # fmt: skip
                            lane += P if SPREAD else 1
                        step += 1
                    elif kind == MEMORY_IN:
                        unit = tl.program_id(0)
                        arrive(p_counter, SINGLE)
                        arrived += P
                        weight, forget, write = fetch_memory(
                            unit, p_x, p_fast, p_vector, num_units, D, N, DELTA, EPS, BD, CU
                        )
                        wait(p_counter, arrived, SINGLE)
                        while unit < num_units:
                            memory_unit(
                                unit, weight, forget, write, p_inner, p_group, p_columns, p_fast, p_lengths, step,
                                D, N, DELTA, EPS, CU, SPLIT,
                            )  # fmt: skip
                            unit += P
                            if unit < num_units:
                                weight, forget, write = fetch_memory(
                                    unit, p_x, p_fast, p_vector, num_units, D, N, DELTA, EPS, BD, CU
                                )
                    if (kind == DECODE) & (not SPREAD):
                        block_barrier(SINGLE)
                    else:
                        arrive(p_counter, SINGLE)
                        arrived += P
                        wait(p_counter, arrived, SINGLE)
        if num_stop > 0 and all_ended(p_lengths, num_lanes, step - 1, LN):
            step = limit
