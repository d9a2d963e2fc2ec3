"""The launch for a single lane: N tokens, from relay to draw, without coming back to the host.

One loop runs over the turns of all phases, layers and tokens (`kernels.generate.turns`), whose weights come through a
ring for each warp (`kernels.generate.ring`), asked for ahead, across borders of phases and tokens, as fast as they come
and not faster (`kernels.generate.asking`). Activations go from phase to phase as packets (`kernels.generate.packets`),
and one barrier a token is left, before the token is drawn. A turn takes all channels, or several portions of them.
Products are float32, row by row; each warp has whole rows and all activations, so that sums stay within it.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.activations import (
    gather_channels,
    gather_normed,
    load_channels,
    load_normed,
    room_bytes,
    room_channels,
    room_values,
    shared_room,
    still_put,
)
from kernels.generate.asking import drain, release
from kernels.generate.barriers import arrive, block_barrier, wait
from kernels.generate.device import silu
from kernels.generate.matrix_order import CORTEX_IN, DECODE, MEMORY_IN, MLP_IN, MLP_OUT, OUT
from kernels.generate.packet_phases import (
    ask_for_neurons,
    ask_for_unit,
    fetch_neurons,
    memory_packets,
    relay_packets,
    send_gates,
    spike_packets,
)
from kernels.generate.packets import append, prefetch, send_here, store_here, value_in
from kernels.generate.ring import next_slot, products, products_of_chunks, start_ring, states_of, word_at, words_of
from kernels.generate.sampling import all_ended, filtered_winner, race_lane, recent_ids, record, winner
from kernels.generate.weight_bytes import activation_unit, excess_of, weight_of


@triton.jit
def piece_products(
    fetch, p_pieces, x, excess, o_r, R: tl.constexpr, G: tl.constexpr, GRANULES: tl.constexpr, PIECE: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """With a single program, a portion's rows times the activations x; `[R]`."""
    o_g = tl.arange(0, G)[None, :]
    product = tl.zeros([R, G], tl.float32)
    if INT8:
        product += excess[0][None, :]
    for i in tl.static_range(GRANULES):
        piece = (fetch & 0xFFFFFFFF) + i
        w = tl.load(p_pieces + piece * PIECE + o_r[:, None] * G + o_g, mask=i < (fetch >> 48), other=0)
        product += weight_of(w, INT8) * x[i][None, :]
    return tl.sum(product, 1)


@triton.jit(do_not_specialize=["num_wernicke", "num_memory", "num_broca", "seed_low", "seed_high", "top_k", "limit",
                               "num_ids", "num_stop", "most_portions", "most_turns", "ring_offset"])  # fmt: skip
def packet_kernel(
    p_embedding, p_pieces, p_vectors, p_scales,
    p_ids, p_log_probs, p_lengths, p_seen, p_stop, p_lanes, p_positions, p_cortex, p_memory,
    p_packets, p_candidate, p_candidate_id, p_logits, p_counter, p_table, p_counts,
    num_wernicke, num_memory, num_broca, num_ids, num_stop, limit, seed_low, seed_high,
    temperature, penalty, top_p, log_min_p, top_k, most_portions, most_turns, ring_offset,
    D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, M: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr,
    GRADED: tl.constexpr, DELTA: tl.constexpr, GO: tl.constexpr, THETA: tl.constexpr, BETA: tl.constexpr,
    RHO: tl.constexpr, EPS: tl.constexpr,
    GREEDY: tl.constexpr, PENALTY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    R: tl.constexpr, SHARE: tl.constexpr, WARPS: tl.constexpr, G: tl.constexpr, GRANULES: tl.constexpr,
    CH: tl.constexpr, SLOTS: tl.constexpr, PACE: tl.constexpr, CU: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BP: tl.constexpr, BS: tl.constexpr, BRACE: tl.constexpr, P: tl.constexpr, TABLE: tl.constexpr, INT8: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """Read the token at ids[TAPS - 1], draw the next, and so on until `limit` tokens are drawn or the lane ended.

    Scratch: packets, int64 or int32, as `kernels.generate.packets` orders them, zeros at first; candidate `[2, 4, P]`
    and candidate_id `[2, P]`, logits `[V]` or with a filter `[3, V]`, counter `[1]`, zero at first.

    The table, `[P, F + T]`, has `TurnTable`'s portions and turns, counts how many of them are a program's.

    With INT8 pieces are bytes (`kernels.generate.weight_bytes`) and scales `[P, T, 2, R]` say what a turn's sums are
    multiplied by when they leave; otherwise scales are not read. What belongs to a turn's rows is a tensor with SHARE
    elements for each, one a thread, of which the first is the one that stores.
    """
    FILTER: tl.constexpr = (TOP_K or TOP_P or MIN_P) and not GREEDY
    cortex_vectors: tl.constexpr = (D * (C + 2) + 63) // 64 * 64
    memory_vectors: tl.constexpr = ((2 if DELTA else 1) * (D // N) * (D + 1) + 63) // 64 * 64
    per_layer: tl.constexpr = 8 * D + M
    p_go_vector = p_vectors + (num_wernicke + num_broca) * cortex_vectors + num_memory * memory_vectors
    p_taps = p_go_vector + (((D // C) * (D + 1) + 63) // 64 * 64 if GO else 0)
    p_go = p_packets + (num_wernicke + num_memory + num_broca + 1) * per_layer
    num_units: tl.constexpr = D // CU
    TURN: tl.constexpr = GRANULES * G
    BITS: tl.constexpr = p_pieces.dtype.element_ty.primitive_bitwidth
    PIECE: tl.constexpr = R // WARPS * G  # elements
    SLOT: tl.constexpr = GRANULES * PIECE * BITS // 8  # bytes
    COUNT: tl.constexpr = GRANULES if SINGLE else GRANULES * (128 // BITS)

    PART: tl.constexpr = min(C, N, 64)
    UNIT: tl.constexpr = activation_unit(INT8)
    ASKS: tl.constexpr = PACE > 0
    WIDE: tl.constexpr = p_packets.dtype.element_ty == tl.int64
    room = shared_room(room_bytes(D, M, TURN, PART), SINGLE)
    p_sums = room + room_channels(D, M, TURN) * 9 // 2

    step = tl.full([], 0, tl.int32)
    recent = recent_ids(p_ids + TAPS - 1, TAPS)
    relay_packets(tl.load(p_ids + TAPS - 1), step, recent, p_embedding, p_taps, p_packets, D, TAPS, EPS, BD)
    block_barrier(SINGLE)
    arrived = tl.full([], 0, tl.int32)
    # Counters of the draws are taken modulo 2^32, as the definition does.
    lane_number, position = tl.load(p_lanes).to(tl.int32), (tl.load(p_positions) + 1).to(tl.int32)

    thread = tl.arange(0, R * SHARE)
    o_r = thread // SHARE
    leads = thread % SHARE == 0
    num_portions, num_turns = tl.load(p_counts + tl.program_id(0) * 2), tl.load(p_counts + tl.program_id(0) * 2 + 1)
    p_table += tl.program_id(0) * (most_portions + most_turns)
    p_scales += tl.program_id(0) * (most_turns * 2 * R)
    slot, parity, turn = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    place, portion = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    data, barriers, states, words = thread, thread, place, place
    if not SINGLE:
        words = words_of(ring_offset, GRANULES, SLOTS, WARPS)
        states = states_of(ring_offset, GRANULES, SLOTS, WARPS)
        data, barriers = start_ring(
            thread, ring_offset, p_table, most_portions + most_turns, p_pieces, num_portions, limit * num_portions,
            GRANULES, SLOTS, WARPS, PACE,
        )  # fmt: skip
        release(states, 0, SINGLE)

    x = (tl.zeros([G] if SINGLE else [R * SHARE], tl.float32),) * COUNT
    excess = (tl.zeros([G] if SINGLE else [R * SHARE], tl.float32),) * (4 if INT8 and not SINGLE else 1)
    square = tl.full([], 0.0, tl.float32)
    none = tl.zeros([R * SHARE], tl.float32)
    # Of a pair of matrices, or of two blocks of rows, each its sums.
    sums, more_sums = none, none
    still, gain, bias, adaptation, spikes = none, none, none, none, none
    before, new = tl.zeros([R * SHARE], tl.int32), tl.zeros([R * SHARE], tl.int32)
    what = word_at(p_table, words, most_portions, SINGLE)
    last = limit * num_turns
    while turn < last:
        nth_turn = place
        place = tl.where(place + 1 == num_turns, 0, place + 1)
        following = word_at(p_table, words, most_portions + place, SINGLE)
        flags = what.to(tl.int32)
        count = ((what >> 60) & 7).to(tl.int32)
        is_chunked = (flags & 128) != 0
        kind = (flags >> 4) & 7
        chunk = (flags >> 8) & 63
        half = (flags >> 3) & 1
        layer = ((what >> 24) & 4095).to(tl.int32)
        is_memory = (layer >= num_wernicke) & (layer < num_wernicke + num_memory)
        is_gated = layer >= num_wernicke + num_memory
        epoch = step + 1
        if INT8:
            # Asked for here, so that it is there when the sums are.
            scale, more_scale = none, none
            if flags & 2:
                p_scale = p_scales + nth_turn * (2 * R) + o_r
                scale, more_scale = tl.load(p_scale), tl.load(p_scale + R)
        cortex_before = tl.minimum(layer, num_wernicke) + tl.maximum(layer - num_wernicke - num_memory, 0)
        memory_before = tl.minimum(tl.maximum(layer - num_wernicke, 0), num_memory)
        p_vector = p_vectors + cortex_before * cortex_vectors + memory_before * memory_vectors
        p_state = p_cortex + cortex_before * (3 * D)
        p_fast = p_memory + memory_before.to(tl.int64) * (D * N)

        o_n = ((what >> 36) & 0xFFFFFF).to(tl.int32) + o_r
        rows = o_r < ((flags >> 14) & 1023)
        mask = rows & leads
        p_layer = p_packets + layer * per_layer
        if (chunk == 0) & (half == 0):
            # What does not wait for this phase's activations: the neurons' state, what sums will be added to, and
            # the new spikes, which become the state's. (Not opened yet, which would wait for them.)
            if kind == CORTEX_IN:
                still, gain, bias, adaptation, spikes = fetch_neurons(
                    o_n, rows, thread, p_state, p_vector, D, C, SHARE, THETA, RHO
                )
            elif kind == MEMORY_IN:
                if flags & 1:
                    ask_for_unit(tl.program_id(0), p_fast, p_vector, D, N, DELTA, CU, BD, SINGLE)
            else:
                p_before = p_layer + tl.where(kind == MLP_OUT, 3 * D, 0)
                adds = mask & ((kind == OUT) | (kind == MLP_OUT))
                spiked = adds & (kind == OUT)
                before = tl.load(p_before + o_n, mask=adds, other=0, cache_modifier=".cg").to(tl.int32)
                new = tl.load(p_layer + 2 * D + o_n, mask=spiked, other=0, cache_modifier=".cg").to(tl.int32)

        if not SINGLE:  # noqa: SIM102, one is decided when compiled
            if ((following >> 4) & 7) == CORTEX_IN:
                # The next turn's neurons: their lateral weights, read once a token, are not in L2.
                ask_for_neurons(
                    following, o_r, thread, p_vectors, num_wernicke, num_memory, D, C, SHARE, cortex_vectors,
                    memory_vectors,
                )  # fmt: skip

        if flags & 1:
            if not SINGLE:
                # All of a phase's activations at once.
                if kind == OUT:
                    if C == N:
                        gated = is_gated & (not is_memory)
                        ready = gather_normed(
                            room, p_sums, p_layer + D, p_layer + 2 * D, p_go, epoch, states, gated,
                            D, GO, C, PART, EPS, CH, TURN, UNIT, ASKS,
                        )  # fmt: skip
                    elif is_memory:
                        ready = gather_normed(
                            room, p_sums, p_layer + D, p_layer + 2 * D, p_go, epoch, states, False,
                            D, False, N, PART, EPS, CH, TURN, UNIT, ASKS,
                        )  # fmt: skip
                    else:
                        ready = gather_normed(
                            room, p_sums, p_layer + D, p_layer + 2 * D, p_go, epoch, states, is_gated,
                            D, GO, C, PART, EPS, CH, TURN, UNIT, ASKS,
                        )  # fmt: skip
                elif kind == MLP_OUT:
                    ready, _ = gather_channels(
                        room, p_sums, p_layer + 4 * D, epoch, states, M, False, PART, CH, TURN, UNIT, ASKS
                    )
                else:
                    ready, square = gather_channels(
                        room, p_sums, p_layer + tl.where(kind == MLP_IN, 3 * D, 0), epoch, states, D, True, PART, CH,
                        TURN, UNIT, ASKS,
                    )  # fmt: skip
                # Products of chunks find theirs in the room.
                if not is_chunked:
                    x = room_values(ready, 0, thread, GRANULES, BITS)
                    if INT8:
                        excess = excess_of(x, 4, 4)
            if GO:  # noqa: SIM102, one is decided when compiled
                if (kind == CORTEX_IN) & (layer == num_wernicke + num_memory):
                    block_barrier(SINGLE)
                    send_gates(p_layer, p_go, p_go_vector, epoch, D, D // C, EPS, BD)

        if SINGLE:
            for j in tl.static_range(2):
                nth = chunk + j
                first = nth * TURN
                if (is_chunked & (j < count)) | (((flags & 1) != 0) & (nth == chunk)):
                    if kind == OUT:
                        if is_memory:
                            x = load_normed(
                                p_layer + D, p_layer + 2 * D, p_go, first, False, D, False, N, EPS, G, GRANULES
                            )
                        else:
                            x = load_normed(
                                p_layer + D, p_layer + 2 * D, p_go, first, is_gated, D, GO, C, EPS, G, GRANULES
                            )
                    elif kind == MLP_OUT:
                        x = load_channels(p_layer + 4 * D, first, M, G, GRANULES)
                    else:
                        x = load_channels(p_layer + tl.where(kind == MLP_IN, 3 * D, 0), first, D, G, GRANULES)
                        squares = x[0] * x[0]
                        for i in tl.static_range(1, GRANULES):
                            squares += x[i] * x[i]
                        square = tl.where(nth == 0, 0.0, square) + tl.sum(squares, 0)
                    if INT8:
                        scaled = ()
                        for i in tl.static_range(GRANULES):
                            scaled = append(scaled, x[i] * UNIT)
                        x = scaled
                        excess = excess_of(x, 1, 1)
                if j < count:
                    fetch = word_at(p_table, words, portion, SINGLE)
                    out = piece_products(fetch, p_pieces, x, excess, o_r, R, G, GRANULES, PIECE, INT8)
                    is_more = (half == 1) | ((nth != chunk) & (not is_chunked))
                    is_first = (nth == 0) | (not is_chunked)
                    sums = tl.where(is_more, sums, tl.where(is_first, 0.0, sums) + out)
                    more_sums = tl.where(is_more, tl.where(is_first, 0.0, more_sums) + out, more_sums)
                    portion = tl.where(portion + 1 == num_portions, 0, portion + 1)
        elif is_chunked & (count > 0):
            out = products_of_chunks(
                data, barriers, states, slot, parity, count, still_put(room), chunk * TURN, thread,
                GRANULES, BITS, INT8, SLOT, SLOTS,
            )  # fmt: skip
            sums = tl.where(half == 0, tl.where(chunk == 0, 0.0, sums) + out, sums)
            more_sums = tl.where(half == 1, tl.where(chunk == 0, 0.0, more_sums) + out, more_sums)
        elif count == 2:
            sums, more_sums = products(
                data, barriers, states, slot, parity, x, excess, GRANULES, BITS, INT8, 2, SLOT, SLOTS
            )  # fmt: skip
        elif count == 1:
            out = products(data, barriers, states, slot, parity, x, excess, GRANULES, BITS, INT8, 1, SLOT, SLOTS)
            sums, more_sums = tl.where(half == 0, out, sums), tl.where(half == 1, out, more_sums)

        if flags & 2:
            out, more = sums, more_sums
            if INT8:
                out, more = out * scale, more * more_scale
            if (kind == OUT) | (kind == MLP_OUT):
                p_out = p_layer + tl.where(kind == OUT, 3 * D, per_layer)
                send_here(p_out + o_n, value_in(before, WIDE) + out, epoch, mask, SINGLE)
                store_here(p_state + 2 * D + o_n, value_in(new, WIDE), mask & (kind == OUT) & (not is_memory), SINGLE)
            else:
                factor = tl.rsqrt(square / D + EPS)
                out, more = out * factor, more * factor
                if kind == CORTEX_IN:
                    fired = spike_packets(
                        out, still, gain, bias, adaptation, spikes, o_n, mask, p_state, p_layer + 2 * D,
                        p_lengths, step, D, GRADED, THETA, BETA, SINGLE,
                    )  # fmt: skip
                    send_here(p_layer + D + o_n, fired * silu(more), epoch, mask, SINGLE)
                elif kind == MLP_IN:
                    send_here(p_layer + 4 * D + o_n, silu(out) * more, epoch, mask, SINGLE)
                else:
                    o_m = o_n + R * P  # a second block's
                    goes = leads & (count == 2) & (not is_chunked) & (o_m < tl.where(kind == DECODE, V, 4 * D))
                    if kind == MEMORY_IN:
                        p_inner = p_layer + (4 * D + M)
                        send_here(p_inner + o_n, out, epoch, mask, SINGLE)
                        send_here(p_inner + o_m, more, epoch, goes, SINGLE)
                    else:
                        store_here(p_logits + o_n, out, mask, SINGLE)
                        store_here(p_logits + o_m, more, goes, SINGLE)

        if not SINGLE:
            # After what others wait for.
            release(states, count, SINGLE)
            slot, parity = next_slot(slot, parity, count, SLOTS)
        what = following

        if flags & 4:
            if not SINGLE:
                # The next phase has others. The compiler does not know, and would keep registers for these.
                x = (tl.zeros([R * SHARE], tl.float32),) * COUNT
            if kind == DECODE:
                # Candidates in turn in two places: a program may still read the last token's.
                p_best, p_best_id = p_candidate + (step & 1) * (4 * P), p_candidate_id + (step & 1) * P
                block_barrier(SINGLE)
                own = race_lane(
                    lane_number, position + step, p_seen, p_best, p_best_id, p_logits, seed_low, seed_high,
                    temperature, penalty, V, GREEDY, PENALTY, FILTER, BRACE, R, SINGLE,
                )  # fmt: skip
                # What does not wait for the other programs: the own candidate's embedding comes to L2, as it may win.
                LINES: tl.constexpr = max(BD // 32, 1)
                prefetch(p_embedding + own * D + tl.minimum(tl.arange(0, LINES) * 32, D - 1), SINGLE)
                recent = recent_ids(p_ids + step + TAPS, TAPS)
                release(states, 0, SINGLE)
                length = tl.load(p_lengths, cache_modifier=".cg")
                previous = tl.load(p_ids + step + TAPS - 1, cache_modifier=".cg")
                arrive(p_counter, SINGLE)
                arrived += P
                wait(p_counter, arrived, SINGLE)
                # Every program finds the winner and relays it by itself; with a filter the first does.
                if tl.program_id(0) < (1 if FILTER else P):
                    token, raw, log_sum = winner(0, p_best, p_best_id, 1, BP, SINGLE)
                    if FILTER:
                        token, raw = filtered_winner(
                            0, p_logits, 1, top_k, top_p, log_min_p, V, TOP_K, TOP_P, MIN_P, BV
                        )
                    token = record(
                        0, token, raw - log_sum, step, length, previous, p_ids, p_log_probs, p_lengths, p_seen, p_stop,
                        num_ids, num_stop, limit, V, TAPS, PENALTY, BS,
                    )  # fmt: skip
                    relay_packets(token, step + 1, recent, p_embedding, p_taps, p_packets, D, TAPS, EPS, BD)
                # Not before: what the draw reads would queue behind it.
                release(states, 0, SINGLE)
                if FILTER:
                    arrive(p_counter, SINGLE)
                    arrived += P
                    wait(p_counter, arrived, SINGLE)
                step += 1
            elif kind == MEMORY_IN:
                unit = tl.program_id(0)
                while unit < num_units:
                    memory_packets(
                        unit, room, states, square, p_layer, p_vector, p_layer + (4 * D + M), p_layer + 2 * D,
                        p_layer + D, p_fast, p_lengths, step, D, N, DELTA, EPS, CU, BD, UNIT, SINGLE,
                    )  # fmt: skip
                    unit += P
            # What a thread stored may be read by another of this program.
            block_barrier(SINGLE)
            if (kind == DECODE) & (num_stop > 0):  # noqa: SIM102, `&` would load it at the end of each phase
                if all_ended(p_lengths, 1, step - 1, 1):
                    last = turn + 1
        turn += 1
    if not SINGLE:
        drain(states, slot, parity, SLOTS)
