"""The launch for a single lane: N tokens, from relay to draw, without coming back to the host.

As `stream_kernel`, one loop runs over the tiles of all phases; but activations go from phase to phase as packets
(`kernels.generate.packets`), and one barrier a token is left, before the token is drawn.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.device import silu
from kernels.generate.packets import (
    as_columns,
    fetch_unit,
    memory_packets,
    normed_groups,
    receive,
    receive_channels,
    relay_packets,
    send,
    send_gates,
    spike_packets,
    value_of,
)
from kernels.generate.sampling import all_ended, filtered_winner, race_logits, record, winner
from kernels.generate.stream import CORTEX_IN, DECODE, MEMORY_IN, MLP_IN, MLP_OUT, OUT
from kernels.generate.stream_phases import arrive, block_barrier, column_parts, wait


@triton.jit(do_not_specialize=["num_wernicke", "num_memory", "num_broca", "seed_low", "seed_high", "top_k", "limit",
                               "num_ids", "num_stop", "num_tiles", "zero"])  # fmt: skip
def packet_kernel(
    p_embedding, d_tiles, p_vectors,
    p_ids, p_log_probs, p_lengths, p_seen, p_stop, p_lanes, p_positions, p_cortex, p_memory,
    p_packets, p_candidate, p_candidate_id, p_logits, p_counter, p_table,
    num_wernicke, num_memory, num_broca, num_ids, num_stop, limit, seed_low, seed_high,
    temperature, penalty, top_p, log_min_p, top_k, num_tiles, zero,
    D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, M: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr,
    GRADED: tl.constexpr, DELTA: tl.constexpr, GO: tl.constexpr, THETA: tl.constexpr, BETA: tl.constexpr,
    RHO: tl.constexpr, EPS: tl.constexpr,
    GREEDY: tl.constexpr, PENALTY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    BL: tl.constexpr, LN: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr,
    CU: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    BRACE: tl.constexpr, TOKENS: tl.constexpr, P: tl.constexpr, FD: tl.constexpr, FM: tl.constexpr,
    PACK_D: tl.constexpr, PACK_M: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Read the token at ids[TAPS - 1], draw the next, and so on until `limit` tokens are drawn or the lane ended.

    Scratch: packets of int64 as `kernels.generate.packets` orders them, zeros at first; candidate `[2, 4, P]` and
    candidate_id `[2, P]`, logits `[V]` or with a filter `[3, V]`, counter `[1]`, zero at first.
    """
    FILTER: tl.constexpr = (TOP_K or TOP_P or MIN_P) and not GREEDY
    cortex_vectors: tl.constexpr = (D * (C + 2) + 63) // 64 * 64
    memory_vectors: tl.constexpr = ((2 if DELTA else 1) * (D // N) * (D + 1) + 63) // 64 * 64
    per_layer: tl.constexpr = 8 * D + M
    type: tl.constexpr = p_embedding.dtype.element_ty
    p_go_vector = p_vectors + (num_wernicke + num_broca) * cortex_vectors + num_memory * memory_vectors
    p_taps = p_go_vector + (((D // C) * (D + 1) + 63) // 64 * 64 if GO else 0)
    p_go = p_packets + (num_wernicke + num_memory + num_broca + 1) * per_layer
    num_units: tl.constexpr = D // CU

    step = tl.full([], 0, tl.int32)
    relay_packets(tl.load(p_ids + TAPS - 1), step, p_ids, p_embedding, p_taps, p_packets, D, TAPS, EPS, BD)
    block_barrier(SINGLE)
    arrived = tl.full([], 0, tl.int32)

    o_r = tl.arange(0, R)
    _, column_chunk, _ = column_parts(BL, 1, SPLIT)
    p_table += tl.program_id(0) * num_tiles * 2
    while step < limit:
        x = tl.zeros([NB, KS, BL], type)
        row_scale = tl.full([], 1.0, tl.float32)
        acc = tl.zeros([NB, R, BL], tl.float32)
        held, before, new = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)

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
            is_gated = layer >= num_wernicke + num_memory
            epoch = step + 1

            o_n = (tile >> 36).to(tl.int32) + o_r
            mask = o_r < ((flags >> 14) & 1023)
            p_layer = p_packets + layer * per_layer
            if chunk == 0:
                acc = tl.zeros([NB, R, BL], tl.float32)
                # What the sums will be added to, and the new spikes, which become the state's; both are there.
                p_before = p_layer + tl.where(kind == MLP_OUT, 3 * D, 0)
                adds = mask & ((kind == OUT) | (kind == MLP_OUT))
                before = value_of(tl.load(p_before + o_n, mask=adds, other=0, cache_modifier=".cg"))
                new = value_of(tl.load(p_layer + 2 * D + o_n, mask=adds & (kind == OUT), other=0, cache_modifier=".cg"))

            if flags & 1:
                if kind == MLP_OUT:
                    x = as_columns(
                        receive_channels(p_layer + 4 * D, epoch, M, FM, PACK_M, SINGLE), type, NB, KS, BL, SPLIT
                    )
                else:
                    p_in = p_layer + tl.where(kind == OUT, D, tl.where(kind == MLP_IN, 3 * D, 0))
                    value = receive_channels(p_in, epoch, D, FD, PACK_D, SINGLE)
                    if kind == OUT:
                        group = receive_channels(p_layer + 2 * D, epoch, D, FD, PACK_D, SINGLE)
                        if is_memory:
                            value = normed_groups(value, group, tl.full([FD // N], 1.0, tl.float32), N, EPS)
                        else:
                            gate = tl.full([FD // C], 1.0, tl.float32)
                            if GO:  # noqa: SIM102, one is decided when compiled
                                if is_gated:
                                    gate = receive(p_go + tl.arange(0, FD // C) % (D // C), epoch, 1, SINGLE)
                            value = normed_groups(value, group, gate, C, EPS)
                    else:
                        row_scale = tl.rsqrt(tl.sum(value * value, 0) / D + EPS)
                    x = as_columns(value, type, NB, KS, BL, SPLIT)
                if GO:  # noqa: SIM102, one is decided when compiled
                    if (kind == CORTEX_IN) & (layer == num_wernicke + num_memory):
                        block_barrier(SINGLE)
                        send_gates(p_layer, p_go, p_go_vector, epoch, D, D // C, EPS, BD)

            # Of all columns' products with this chunk of weights, those of its own activations count.
            counts = (column_chunk == chunk).to(tl.float32)
            acc += tl.dot(w, x, input_precision="ieee") * counts[None, None, :]

            if flags & 2:
                out = tl.sum(tl.sum(acc, 2), 0)
                cortex_before = tl.minimum(layer, num_wernicke) + tl.maximum(layer - num_wernicke - num_memory, 0)
                memory_before = tl.minimum(tl.maximum(layer - num_wernicke, 0), num_memory)
                p_vector = p_vectors + cortex_before * cortex_vectors + memory_before * memory_vectors
                p_state = p_cortex + cortex_before * (3 * D)
                p_fast = p_memory + memory_before.to(tl.int64) * (D * N)
                half = (flags >> 3) & 1
                if (kind == OUT) | (kind == MLP_OUT):
                    p_out = p_layer + tl.where(kind == OUT, 3 * D, per_layer)
                    send(p_out + o_n, before + out, epoch, mask)
                    tl.store(p_state + 2 * D + o_n, new, mask=mask & (kind == OUT) & (not is_memory))
                else:
                    out *= row_scale
                    if kind == MEMORY_IN:
                        send(p_layer + (4 * D + M) + o_n, out, epoch, mask)
                    elif kind == DECODE:
                        tl.store(p_logits + o_n, out, mask=mask)
                    elif kind == CORTEX_IN:
                        if half == 0:
                            held = spike_packets(
                                out, o_n, mask, p_state, p_vector, p_layer + 2 * D, p_lengths, step,
                                D, C, GRADED, THETA, BETA, RHO,
                            )  # fmt: skip
                        else:
                            send(p_layer + D + o_n, held * silu(out), epoch, mask)
                    else:
                        if half == 0:
                            held = silu(out)
                        else:
                            send(p_layer + 4 * D + o_n, held * out, epoch, mask)

                if flags & 4:
                    if kind == DECODE:
                        # Candidates in turn in two places: a program may still read the last token's.
                        p_best, p_best_id = p_candidate + (step & 1) * (4 * P), p_candidate_id + (step & 1) * P
                        block_barrier(SINGLE)
                        race_logits(
                            p_seen, p_lanes, p_positions, p_best, p_best_id, p_logits, step, 1,
                            seed_low, seed_high, temperature, penalty, V, GREEDY, PENALTY, FILTER, 1, BRACE, R,
                        )  # fmt: skip
                        arrive(p_counter, SINGLE)
                        arrived += P
                        wait(p_counter, arrived, SINGLE)
                        # Every program finds the winner and relays it by itself; with a filter the first does.
                        if tl.program_id(0) < (1 if FILTER else P):
                            token, raw, log_sum = winner(0, p_best, p_best_id, 1, BP)
                            if FILTER:
                                token, raw = filtered_winner(
                                    0, p_logits, 1, top_k, top_p, log_min_p, V, TOP_K, TOP_P, MIN_P, BV
                                )
                            token = record(
                                0, token, raw - log_sum, step, p_ids, p_log_probs, p_lengths, p_seen, p_stop,
                                num_ids, num_stop, limit, V, TAPS, PENALTY, BS,
                            )  # fmt: skip
                            relay_packets(token, step + 1, p_ids, p_embedding, p_taps, p_packets, D, TAPS, EPS, BD)
                        if FILTER:
                            arrive(p_counter, SINGLE)
                            arrived += P
                            wait(p_counter, arrived, SINGLE)
                        step += 1
                    elif kind == MEMORY_IN:
                        unit = tl.program_id(0)
                        weight, forget, write = fetch_unit(
                            unit, p_layer, p_fast, p_vector, num_units, D, N, DELTA, EPS, BD, CU
                        )
                        while unit < num_units:
                            memory_packets(
                                unit, weight, forget, write, p_layer + (4 * D + M), p_layer + 2 * D, p_layer + D,
                                p_fast, p_lengths, step, D, N, DELTA, EPS, CU, SINGLE,
                            )  # fmt: skip
                            unit += P
                            if unit < num_units:
                                weight, forget, write = fetch_unit(
                                    unit, p_layer, p_fast, p_vector, num_units, D, N, DELTA, EPS, BD, CU
                                )
                    # What a thread stored may be read by another of this program.
                    block_barrier(SINGLE)
        if num_stop > 0 and all_ended(p_lengths, 1, step - 1, 1):
            step = limit
