"""Sampling inside a kernel: draws and thresholds as functions for other kernels to call.

Thresholds are found by quartering an interval of floats ordered as integers, so that nothing is sorted: the smallest t
for which the tokens likelier than t weigh less than a target is the last logit that top-k or top-p keeps.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl


@triton.jit
def philox_word(seed_low, seed_high, ids, positions, lanes):
    """First word of Philox-4x32-10 at counter (ids, positions, lanes, 0), as `kernels.sample.philox.philox` gives it.

    Arguments:
        seed_low, seed_high: the 64-bit key in halves, int32.
        ids, positions, lanes: int32 of one shape.

    Returns:
        uint32 of that shape.
    """
    c0 = ids.to(tl.uint32, bitcast=True)
    c1 = positions.to(tl.uint32, bitcast=True)
    c2 = lanes.to(tl.uint32, bitcast=True)
    key0 = tl.zeros_like(ids) + seed_low
    key1 = tl.zeros_like(ids) + seed_high
    key0, key1 = key0.to(tl.uint32, bitcast=True), key1.to(tl.uint32, bitcast=True)
    word, _, _, _ = tl.philox_impl(c0, c1, c2, tl.zeros_like(c0), key0, key1)
    return word


@triton.jit
def exponential_draw(word):
    """A standard exponential draw from a 32-bit word, as `kernels.sample.philox.exponential` gives it."""
    w = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.960464477539063e-08)
    series = w * (1.0 + w * (0.5 + w * (1.0 / 3.0 + w * 0.25)))
    return tl.where(w < 0.015625, series, -tl.log(1.0 - w))


@triton.jit
def penalized(logits, seen, penalty):
    """Logits of seen tokens divided by the repetition penalty where positive, multiplied where not."""
    return tl.where(seen, tl.where(logits > 0, logits / penalty, logits * penalty), logits)


@triton.jit
def order_key(x):
    """float32 to int32 so that order is kept."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order_key(key):
    """The inverse of `order_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def row_max(p_row, num_ids, BLOCK: tl.constexpr):
    """Largest of `num_ids` floats at p_row."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    start = 0
    while start < num_ids:
        o_v = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(p_row + o_v, mask=o_v < num_ids, other=float("-inf"), cache_modifier=".cg"))
        start += BLOCK
    return tl.max(best, 0)


@triton.jit
def weight_above(p_row, num_ids, threshold, lowest, largest, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Weight of the logits above `threshold` and not below `lowest`: their count, or their sum of exp(z - largest)."""
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < num_ids:
        o_v = start + tl.arange(0, BLOCK)
        z = tl.load(p_row + o_v, mask=o_v < num_ids, other=float("-inf"), cache_modifier=".cg")
        weight = tl.full([BLOCK], 1.0, tl.float32) if COUNT else tl.exp(z - largest)
        total += tl.where((z > threshold) & (z >= lowest), weight, 0.0)
        start += BLOCK
    return tl.sum(total, 0)


@triton.jit
def weights_above(p_row, num_ids, a, b, c, lowest, largest, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """`weight_above` of three thresholds, for one reading of the row."""
    t_a, t_b, t_c = from_order_key(a.to(tl.int32)), from_order_key(b.to(tl.int32)), from_order_key(c.to(tl.int32))
    above_a = tl.zeros([BLOCK], tl.float32)
    above_b, above_c = above_a, above_a
    start = 0
    while start < num_ids:
        o_v = start + tl.arange(0, BLOCK)
        z = tl.load(p_row + o_v, mask=o_v < num_ids, other=float("-inf"), cache_modifier=".cg")
        weight = tl.full([BLOCK], 1.0, tl.float32) if COUNT else tl.exp(z - largest)
        weight = tl.where(z >= lowest, weight, 0.0)
        above_a += tl.where(z > t_a, weight, 0.0)
        above_b += tl.where(z > t_b, weight, 0.0)
        above_c += tl.where(z > t_c, weight, 0.0)
        start += BLOCK
    return tl.sum(above_a, 0), tl.sum(above_b, 0), tl.sum(above_c, 0)


@triton.jit
def narrowed(low, high, middle, weight, target, COUNT: tl.constexpr):
    """The interval once the weight above `middle` is known."""
    is_enough = weight >= target
    low = tl.where(is_enough, tl.maximum(low, middle), low)
    high = tl.where(is_enough, high, tl.minimum(high, middle))
    if COUNT:
        # Exactly the k likeliest are above: any threshold up to the k-th keeps the same tokens.
        high = tl.where(weight == target, middle + 1, high)
    return low, high


@triton.jit
def smallest_kept(p_row, num_ids, target, lowest, largest, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest t with `weight_above(t) < target`.

    With COUNT and target k it is the k-th largest logit (top-k); with target p times the whole weight it is the last
    logit of the nucleus (top-p). Tokens exactly as likely as it are kept by `z >= t`.

    Arguments:
        p_row: logits in memory, `[num_ids]` float32.
        target: above 0.
        lowest: logits below it do not count.
        largest: the largest logit.
    """
    low = order_key(lowest).to(tl.int64) - 1
    high = order_key(largest).to(tl.int64)
    while high - low > 1:
        width = high - low
        a, b, c = low + width // 4, low + width // 2, low + width * 3 // 4
        above_a, above_b, above_c = weights_above(p_row, num_ids, a, b, c, lowest, largest, COUNT, BLOCK)
        low, high = narrowed(low, high, a, above_a, target, COUNT)
        low, high = narrowed(low, high, b, above_b, target, COUNT)
        low, high = narrowed(low, high, c, above_c, target, COUNT)
    return from_order_key(high.to(tl.int32))


@triton.jit
def filter_threshold(
    p_row,
    num_ids,
    top_k,
    top_p,
    log_min_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The logit below which top-k, then top-p, then min-p drop a token; p_row has penalty and temperature in it.

    Arguments:
        top_k: int32, at least 1 where TOP_K.
        top_p: float32 in (0, 1) where TOP_P.
        log_min_p: float32, at most 0 where MIN_P.
    """
    largest = row_max(p_row, num_ids, BLOCK)
    threshold = tl.full([], -3.4028234663852886e38, tl.float32)
    if TOP_K:
        wanted = tl.minimum(top_k, num_ids).to(tl.float32)
        threshold = smallest_kept(p_row, num_ids, wanted, threshold, largest, True, BLOCK)
    if TOP_P:
        whole = weight_above(p_row, num_ids, float("-inf"), threshold, largest, False, BLOCK)
        threshold = smallest_kept(p_row, num_ids, top_p * whole, threshold, largest, False, BLOCK)
    if MIN_P:
        threshold = tl.maximum(threshold, largest + log_min_p)
    return threshold
