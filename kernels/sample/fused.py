"""Linear decoder and sampling for one position a lane in two launches.

The first spreads the vocabulary over programs: logits, what penalty and temperature make of them, and each id's score
in the race for the token, which depends on nothing but its own logit and draw. The second has one program a lane: it
finds the filters' threshold without sorting, then the best score at or above it.
"""

import kernels.launch  # noqa: F401, I001  before triton: it chooses the interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import check_launchable
from kernels.sample.device import exponential_draw, filter_threshold, penalized, philox_word
from kernels.sample.reference import SampleOutput, Sampling

# Ids and channels of a tile of the weight and lanes of a tile of hidden states, whose products are on tensor cores.
_LOGITS_TILE = {"BLOCK_V": 64, "BLOCK_K": 64, "BLOCK_B": 16, "num_warps": 4, "num_stages": 4}
_DRAW_BLOCK = 8192
_DRAW_WARPS = 16


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def sample_logits_kernel(
    hidden_ptr,  # [B, D]
    weight_ptr,  # [V, D]
    seen_ptr,  # [B, V] bool, if PENALTY
    lane_ptr,  # [B] int64
    position_ptr,  # [B] int64
    logits_ptr,  # [3, B, V] float32: logits, after penalty and temperature, scores in the race
    num_lanes,
    num_ids,
    seed_low,
    seed_high,
    penalty,
    temperature,
    D: tl.constexpr,
    PENALTY: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_k = tl.arange(0, BLOCK_K)
    in_vocabulary, in_batch = o_v < num_ids, o_b < num_lanes
    p_weight = weight_ptr + o_v.to(tl.int64)[:, None] * D + o_k[None, :]
    p_hidden = hidden_ptr + o_b.to(tl.int64)[:, None] * D + o_k[None, :]
    b_logit = tl.zeros((BLOCK_V, BLOCK_B), tl.float32)
    for k in range(0, D, BLOCK_K):
        in_row = (k + o_k < D)[None, :]
        b_weight = tl.load(p_weight + k, mask=in_vocabulary[:, None] & in_row, other=0.0)
        b_hidden = tl.load(p_hidden + k, mask=in_batch[:, None] & in_row, other=0.0)
        b_logit = tl.dot(b_weight.to(b_hidden.dtype), tl.trans(b_hidden), b_logit, input_precision="ieee")

    mask = in_vocabulary[:, None] & in_batch[None, :]
    plane = tl.cast(num_lanes, tl.int64) * num_ids
    o_n = o_b.to(tl.int64)[None, :] * num_ids + o_v[:, None]
    tl.store(logits_ptr + o_n, b_logit, mask=mask)
    if PENALTY:
        b_logit = penalized(b_logit, tl.load(seen_ptr + o_n, mask=mask, other=0) != 0, penalty)
    if not GREEDY:
        b_logit = b_logit / temperature
    tl.store(logits_ptr + plane + o_n, b_logit, mask=mask)
    if not GREEDY:
        # Counters are taken modulo 2^32, as the definition does.
        counter = tl.zeros((BLOCK_V, BLOCK_B), tl.int32)
        b_position = tl.load(position_ptr + o_b, mask=in_batch, other=0).to(tl.int32)
        b_lane = tl.load(lane_ptr + o_b, mask=in_batch, other=0).to(tl.int32)
        b_word = philox_word(
            seed_low, seed_high, counter + o_v[:, None], counter + b_position[None, :], counter + b_lane[None, :]
        )
        b_logit = b_logit - tl.log(exponential_draw(b_word))
    tl.store(logits_ptr + 2 * plane + o_n, b_logit, mask=mask)


@triton.jit(do_not_specialize=["top_k"])
def sample_draw_kernel(
    logits_ptr,  # [3, B, V] float32, as above
    token_ptr,  # [B] int64
    log_prob_ptr,  # [B] float32
    num_lanes,
    num_ids,
    top_k,
    top_p,
    log_min_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    plane = tl.cast(num_lanes, tl.int64) * num_ids
    p_raw = logits_ptr + lane * num_ids
    if TOP_K or TOP_P or MIN_P:
        threshold = filter_threshold(p_raw + plane, num_ids, top_k, top_p, log_min_p, TOP_K, TOP_P, MIN_P, BLOCK)
    b_best = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_best_id = tl.zeros((BLOCK,), tl.int32)
    b_max = tl.full((BLOCK,), -1e38, tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_ids, BLOCK):
        b_id = first + offsets
        mask = b_id < num_ids
        b_raw = tl.load(p_raw + b_id, mask=mask, other=float("-inf"))
        b_larger = tl.maximum(b_max, b_raw)
        b_sum = b_sum * tl.exp(b_max - b_larger) + tl.exp(b_raw - b_larger)
        b_max = b_larger
        b_score = tl.load(p_raw + 2 * plane + b_id, mask=mask, other=float("-inf"))
        if TOP_K or TOP_P or MIN_P:
            b_logit = tl.load(p_raw + plane + b_id, mask=mask, other=float("-inf"))
            b_score = tl.where(b_logit >= threshold, b_score, float("-inf"))
        b_best_id = tl.where(b_score > b_best, b_id, b_best_id)
        b_best = tl.maximum(b_best, b_score)
    best = tl.max(b_best, axis=0)
    token = tl.min(tl.where(b_best == best, b_best_id, num_ids - 1), axis=0)
    largest = tl.max(b_max, axis=0)
    log_sum = tl.log(tl.sum(b_sum * tl.exp(b_max - largest), axis=0)) + largest
    tl.store(token_ptr + lane, token.to(tl.int64))
    tl.store(log_prob_ptr + lane, tl.load(p_raw + token) - log_sum)


@torch.library.custom_op("neurogen::sample_forward", mutates_args=())
def sample_forward(
    hidden: Tensor,
    weight: Tensor,
    repetition_penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    lanes: Tensor,
    positions: Tensor,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities `[B]`; see `sample_fused`. The seed is a signed 64-bit number here."""
    num_lanes, num_ids = hidden.shape[0], weight.shape[0]
    tokens = torch.empty(num_lanes, dtype=torch.int64, device=hidden.device)
    log_probs = torch.empty(num_lanes, dtype=torch.float32, device=hidden.device)
    if num_lanes == 0:
        return tokens, log_probs
    logits = torch.empty(3, num_lanes, num_ids, dtype=torch.float32, device=hidden.device)
    tile = dict(_LOGITS_TILE)
    sample_logits_kernel[(triton.cdiv(num_ids, tile["BLOCK_V"]), triton.cdiv(num_lanes, tile["BLOCK_B"]))](
        hidden.contiguous(),
        weight.contiguous(),
        None if seen is None else seen.contiguous(),
        lanes.contiguous(),
        positions.contiguous(),
        logits,
        num_lanes,
        num_ids,
        _signed(seed, 32),
        _signed(seed >> 32, 32),
        repetition_penalty,
        temperature,
        D=hidden.shape[1],
        PENALTY=repetition_penalty != 1,
        GREEDY=temperature == 0,
        **tile,
    )
    draws = temperature != 0
    block = min(_DRAW_BLOCK, max(triton.next_power_of_2(num_ids), 32))
    sample_draw_kernel[(num_lanes,)](
        logits,
        tokens,
        log_probs,
        num_lanes,
        num_ids,
        top_k,
        top_p,
        float(torch.log(torch.tensor(min_p))),
        TOP_K=draws and 0 < top_k < num_ids,
        TOP_P=draws and top_p < 1,
        MIN_P=draws and min_p > 0,
        BLOCK=block,
        num_warps=max(min(_DRAW_WARPS, block // 32), 1),
    )
    return tokens, log_probs


@sample_forward.register_fake
def _(hidden, weight, penalty, temperature, top_k, top_p, min_p, seed, lanes, positions, seen):  # type: ignore[no-untyped-def]
    num_lanes = hidden.shape[0]
    return hidden.new_empty(num_lanes, dtype=torch.int64), hidden.new_empty(num_lanes, dtype=torch.float32)


def _signed(value: int, bits: int) -> int:
    """`value` modulo 2^bits, as a signed number of that many bits."""
    return (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


def sample_fused(
    hidden: Tensor,
    weight: Tensor,
    sampling: Sampling,
    *,
    seed: int,
    lanes: Tensor,
    positions: Tensor,
    seen: Tensor | None = None,
) -> SampleOutput:
    """`sample_reference` in two launches; arguments and results as there, without gradients.

    Logits stay in float32, where the reference rounds them to hidden's type; a weight of another type is rounded to
    hidden's.

    Raises:
        ValueError: the tensors are not all on one device that fused kernels run on, or are float64.
    """
    check_launchable("sample", hidden, weight, lanes, positions, seen)
    assert sampling.repetition_penalty == 1 or seen is not None, "a repetition penalty needs the tokens seen so far"
    return SampleOutput(
        *sample_forward(
            hidden.detach(),
            weight.detach(),
            sampling.repetition_penalty,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            _signed(seed, 64),
            lanes,
            positions,
            seen,
        )
    )
