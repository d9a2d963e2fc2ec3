"""The last phases of a token: logits, the token drawn from them, and the relay of the token into the workspace.

Each program races its own share of the vocabulary (the draw of an id depends on nothing but seed, lane, position and
id) and leaves one candidate a lane; a lane's winner is found from P candidates, or, where a filter needs to see all
logits, by one program a lane.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

from kernels.generate.device import load_shares, norm_scale, numbers, prefetch, project, share
from kernels.sample.device import exponential_draw, filter_threshold, four_blocks, penalized, philox_word


_LOWEST = tl.constexpr(-3.0e38)  # where there is no logit: not -inf, whose difference from itself is no number


@triton.jit
def raced(z, ids, positions, lane_numbers, seed_low, seed_high, temperature, GREEDY: tl.constexpr):
    """Logits as they are drawn from, and scores, the largest of which wins: with Gumbel noise, or greedy without."""
    score = z
    if not GREEDY:
        z = z / temperature
        score = z - tl.log(exponential_draw(philox_word(seed_low, seed_high, ids, positions, lane_numbers)))
    return z, score


@triton.jit
def race(
    program, p_x_columns, p_square, p_decoder, p_seen, p_lanes, p_positions, p_candidate, p_candidate_id, p_logits,
    step, num_lanes, seed_low, seed_high, temperature, penalty,
    D: tl.constexpr, V: tl.constexpr, GREEDY: tl.constexpr, PENALTY: tl.constexpr, FILTER: tl.constexpr,
    EPS: tl.constexpr, GROUPS: tl.constexpr, BQ: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr, NB: tl.constexpr,
    KS: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Logits of this program's ids, and per lane its best id with the score and logit of that, and the largest logit
    with the sum of exp(logit - largest). With FILTER also all raw logits, processed logits and scores, `[3, B, V]`."""
    o_l = numbers(program, BL)
    in_batch = o_l < num_lanes
    tile, last = share(program, V, 1, 1)
    best = tl.full([BL], float("-inf"), tl.float32)
    best_id = tl.zeros([BL], tl.int32)
    best_raw = tl.full([BL], float("-inf"), tl.float32)
    largest = tl.full([BL], _LOWEST, tl.float32)
    total = tl.zeros([BL], tl.float32)
    # Counters are taken modulo 2^32, as the definition does.
    lane_number = tl.load(p_lanes + o_l, mask=in_batch, other=0).to(tl.int32)
    position = (tl.load(p_positions + o_l, mask=in_batch, other=0) + step + 1).to(tl.int32)
    scale = norm_scale(load_shares(program, p_square, GROUPS, BQ, BL), D, EPS)
    while tile < last:
        p_w = p_decoder + tile.to(tl.int64) * D
        # The next tile comes to L2 while this one is multiplied and raced.
        prefetch(p_w + BR * D, tl.minimum(last - tile - BR, BR) * D, 0, LINES)
        out = project(
            program, p_x_columns, p_w, last - tile, num_lanes, 0, p_square, p_square, False,
            D, False, 0, 0, False, D, EPS, BL, BL, BR, NB, KS, STAGES,
        )  # fmt: skip
        raw = tl.trans(out * scale)
        o_v = tile + numbers(program, BR)
        ids = (o_v < last)[None, :]
        mask = in_batch[:, None] & ids
        o_n = o_l[:, None] * V + o_v[None, :]
        z = raw
        if PENALTY:
            seen = tl.load(p_seen + o_n, mask=mask, other=0, cache_modifier=".cg") != 0
            z = penalized(raw, seen, penalty)
        none = tl.zeros([BL, BR], tl.int32)
        z, score = raced(
            z, none + o_v[None, :], none + position[:, None], none + lane_number[:, None], seed_low, seed_high,
            temperature, GREEDY,
        )  # fmt: skip
        if FILTER:
            tl.store(p_logits + o_n, raw, mask=mask)
            tl.store(p_logits + num_lanes * V + o_n, z, mask=mask)
            tl.store(p_logits + 2 * num_lanes * V + o_n, score, mask=mask)
        score = tl.where(ids, score, float("-inf"))
        top = tl.max(score, 1)
        top_id = tile + tl.argmax(score, 1, tie_break_left=True)
        better = top > best
        hit = o_v[None, :] == top_id[:, None]
        best_raw = tl.where(better, tl.sum(tl.where(hit, raw, 0.0), 1), best_raw)
        best_id = tl.where(better, top_id, best_id)
        best = tl.maximum(top, best)
        new_largest = tl.maximum(largest, tl.max(tl.where(ids, raw, _LOWEST), 1))
        total = total * tl.exp(largest - new_largest)
        total += tl.sum(tl.where(ids, tl.exp(raw - new_largest[:, None]), 0.0), 1)
        largest = new_largest
        tile += BR
    o_c = tl.program_id(0) * num_lanes + o_l
    plane = tl.num_programs(0) * num_lanes
    tl.store(p_candidate + o_c, best, mask=in_batch)
    tl.store(p_candidate + plane + o_c, best_raw, mask=in_batch)
    tl.store(p_candidate + 2 * plane + o_c, largest, mask=in_batch)
    tl.store(p_candidate + 3 * plane + o_c, total, mask=in_batch)
    tl.store(p_candidate_id + o_c, best_id, mask=in_batch)


@triton.jit
def better_candidate(score, ids, raw, largest, total, score_b, ids_b, raw_b, largest_b, total_b):
    """Of two candidates the one with the better score, or of equals the lower id; and, of the ids that both stand for,
    the largest logit and the sum of exp(logit - largest)."""
    first = (score > score_b) | ((score == score_b) & (ids < ids_b))
    top = tl.maximum(largest, largest_b)
    total = total * tl.exp(largest - top) + total_b * tl.exp(largest_b - top)
    return tl.where(first, score, score_b), tl.where(first, ids, ids_b), tl.where(first, raw, raw_b), top, total


@triton.jit
def race_lane(
    lane_number, position, p_seen, p_candidate, p_candidate_id, p_logits, seed_low, seed_high, temperature, penalty,
    V: tl.constexpr, GREEDY: tl.constexpr, PENALTY: tl.constexpr, FILTER: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """As `race`, for a single lane, from the raw logits `[V]` of this program's own ids, which it has just stored. Ids
    are dealt out in blocks of UNIT as `turn_table` does, and what is found out takes one exchange between warps.
    Returns the best id, or any where the program has none."""
    place, programs = tl.program_id(0), tl.num_programs(0)
    each = tl.cdiv(tl.cdiv(V, UNIT), programs) * UNIT
    none, lowest = tl.zeros([BV], tl.int32), tl.full([BV], _LOWEST, tl.float32)
    best = tl.full([BV], float("-inf"), tl.float32)
    best_id, best_raw, largest, total = none + V, lowest, lowest, tl.zeros([BV], tl.float32)
    tile = tl.full([], 0, tl.int32)
    while tile < each:
        own = tile + tl.arange(0, BV)
        o_v = (own // UNIT * programs + place) * UNIT + own % UNIT
        ids = (own < each) & (o_v < V)
        raw = tl.load(p_logits + o_v, mask=ids, other=_LOWEST, cache_modifier=".cg")
        z = raw
        if PENALTY:
            seen = tl.load(p_seen + o_v, mask=ids, other=0, cache_modifier=".cg") != 0
            z = penalized(tl.where(ids, raw, 0.0), seen, penalty)
        z, score = raced(
            z, none + o_v, none + position, none + lane_number, seed_low, seed_high, temperature, GREEDY
        )  # fmt: skip
        if FILTER:
            tl.store(p_logits + V + o_v, z, mask=ids)
            tl.store(p_logits + 2 * V + o_v, score, mask=ids)
        score = tl.where(ids, score, float("-inf"))
        here = tl.where(ids, o_v, V)
        one = tl.where(ids, 1.0, 0.0)
        best, best_id, best_raw, largest, total = better_candidate(
            best, best_id, best_raw, largest, total, score, here, raw, raw, one
        )
        tile += BV
    best, best_id, best_raw, largest, total = best_of(best, best_id, best_raw, largest, total, SINGLE)
    tl.store(p_candidate + place, best)
    tl.store(p_candidate + programs + place, best_raw)
    tl.store(p_candidate + 2 * programs + place, largest)
    tl.store(p_candidate + 3 * programs + place, total)
    tl.store(p_candidate_id + place, best_id)
    return tl.minimum(best_id, V - 1)


@triton.jit
def best_of(score, ids, raw, largest, total, SINGLE: tl.constexpr):
    """`better_candidate` over tensors of one dimension; a single program, in the interpreter, goes step by step."""
    if SINGLE:
        top_score, top = tl.max(score, 0), tl.max(largest, 0)
        best_id = tl.min(tl.where(score == top_score, ids, 2**31 - 1), 0)
        best_raw = tl.max(tl.where((score == top_score) & (ids == best_id), raw, _LOWEST), 0)
        return top_score, best_id, best_raw, top, tl.sum(total * tl.exp(largest - top), 0)
    else:
        return tl.reduce((score, ids, raw, largest, total), 0, better_candidate)


@triton.jit
def winner(lane, p_candidate, p_candidate_id, num_lanes, BP: tl.constexpr, SINGLE: tl.constexpr):
    """The best candidate of a lane: its id, its logit, and log sum exp of all logits. Ties go to the lowest id."""
    o_p = tl.arange(0, BP)
    inside = o_p < tl.num_programs(0)
    o_c = o_p * num_lanes + lane
    plane = tl.num_programs(0) * num_lanes
    score = tl.load(p_candidate + o_c, mask=inside, other=float("-inf"), cache_modifier=".cg")
    raw = tl.load(p_candidate + plane + o_c, mask=inside, other=0.0, cache_modifier=".cg")
    largest = tl.load(p_candidate + 2 * plane + o_c, mask=inside, other=_LOWEST, cache_modifier=".cg")
    total = tl.load(p_candidate + 3 * plane + o_c, mask=inside, other=0.0, cache_modifier=".cg")
    ids = tl.load(p_candidate_id + o_c, mask=inside, other=2**31 - 1, cache_modifier=".cg")
    score, best_id, raw, top, total = best_of(score, ids, raw, largest, total, SINGLE)
    return best_id, raw, top + tl.log(total)


@triton.jit
def better(best, best_id, z, score, ids, threshold):
    """The best score and its id so far, of what the filters keep; the earlier of two equals."""
    is_better = (z >= threshold) & (score > best)
    return tl.where(is_better, score, best), tl.where(is_better, ids, best_id)


@triton.jit
def filtered_winner(
    lane, p_logits, num_lanes, top_k, top_p, log_min_p, V: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    MIN_P: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The best-scoring id that the filters keep, and its logit."""
    plane = num_lanes * V
    p_row = p_logits + lane * V
    threshold = filter_threshold(p_row + plane, V, top_k, top_p, log_min_p, TOP_K, TOP_P, MIN_P, BV)
    o_v = tl.arange(0, BV)
    best = tl.full([BV], float("-inf"), tl.float32)
    ids = tl.zeros([BV], tl.int32)
    start = 0
    while start < V:
        z0, z1, z2, z3 = four_blocks(p_row + plane, start, V, BV)
        s0, s1, s2, s3 = four_blocks(p_row + 2 * plane, start, V, BV)
        best, ids = better(best, ids, z0, s0, start + o_v, threshold)
        best, ids = better(best, ids, z1, s1, start + o_v + BV, threshold)
        best, ids = better(best, ids, z2, s2, start + o_v + 2 * BV, threshold)
        best, ids = better(best, ids, z3, s3, start + o_v + 3 * BV, threshold)
        start += 4 * BV
    token = tl.min(tl.where(best == tl.max(best, 0), ids, V - 1), 0)
    return token, tl.load(p_row + token, cache_modifier=".cg")


@triton.jit
def record(
    lane, token, log_prob, step, length, previous, p_ids, p_log_probs, p_lengths, p_seen, p_stop, num_ids, num_stop,
    limit, V: tl.constexpr, TAPS: tl.constexpr, PENALTY: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Write a lane's token behind the ids it has read, `[B, num_ids]`, and return it; a lane that has ended, as its
    length in p_lengths says, repeats `previous`, its last. Every store gives the same value however often it is made,
    as several programs may record the same token."""
    p_token = p_ids + lane * num_ids + step + TAPS
    active = (length == 0) | (length > step)
    token = tl.where(active, token.to(tl.int64), previous)
    tl.store(p_token, token)
    tl.store(p_log_probs + lane * limit + step, tl.where(active, log_prob, 0.0))
    o_s = tl.arange(0, BS)
    stops = tl.load(p_stop + o_s, mask=o_s < num_stop, other=-1)
    stopped = tl.max((stops == token).to(tl.int32), 0) > 0
    tl.store(p_lengths + lane, step + 1, mask=active & stopped)
    if PENALTY:
        tl.store(p_seen + lane * V + token, 1)
    return token


@triton.jit
def recent_ids(p_read, TAPS: tl.constexpr):
    """The ids `[TAPS]` that a lane has read, the last of them before p_read at 1; 0, which is not used, at 0."""
    o_j = tl.arange(0, TAPS)
    return tl.load(p_read - o_j, mask=o_j > 0, other=0, cache_modifier=".cg")


@triton.jit
def relayed(
    token, recent, p_embedding, p_taps, D: tl.constexpr, TAPS: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr
):
    """x `[BD]` = sum_j taps[j] * rms(E[id j places back]) for a token and what `recent_ids` gives; -1 is no token."""
    o_j, o_d = tl.arange(0, TAPS), tl.arange(0, BD)
    inside = (o_d < D)[None, :]
    ids = tl.where(o_j == 0, token, recent)
    p_e = p_embedding + (tl.maximum(ids, 0) * D)[:, None] + o_d[None, :]
    e = tl.load(p_e, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(p_taps + o_j[:, None] * D + o_d[None, :], mask=inside & (ids >= 0)[:, None], other=0.0)
    scale = tl.rsqrt(tl.sum(e * e, 1) / D + EPS)
    return tl.sum(gain * e * scale[:, None], 0)


@triton.jit
def relay_columns(
    lane, token, step, p_ids, num_ids, p_embedding, p_taps, p_x, p_columns, p_square,
    D: tl.constexpr, TAPS: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Store what `relayed` gives for the token a lane reads at `step`; also as columns `[B, D]`, and the sum of its
    squares as the first program's share."""
    o_d = tl.arange(0, BD)
    inside = o_d < D
    p_read = p_ids + lane * num_ids + step + TAPS - 1
    x = relayed(token, recent_ids(p_read, TAPS), p_embedding, p_taps, D, TAPS, EPS, BD)
    tl.store(p_x + lane * D + o_d, x, mask=inside)
    tl.store(p_columns + lane * D + o_d, x.to(p_columns.dtype.element_ty), mask=inside)
    o_p = tl.arange(0, BP)
    square = tl.where(o_p == 0, tl.sum(x * x, 0), 0.0)
    tl.store(p_square + o_p * BL + lane, square, mask=o_p < tl.num_programs(0))


@triton.jit
def all_ended(p_lengths, num_lanes, step, BL: tl.constexpr):
    """Whether every lane has met a stop token at or before `step`."""
    o_l = tl.arange(0, BL)
    length = tl.load(p_lengths + o_l, mask=o_l < num_lanes, other=1, cache_modifier=".cg")
    return tl.min(((length > 0) & (length <= step + 1)).to(tl.int32), 0) > 0
