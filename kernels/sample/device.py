"""Sampling inside a kernel: draws and thresholds as functions for other kernels to call.

The last logit that top-k or top-p keeps is the smallest t for which the tokens likelier than t weigh less than a
target. Nothing is sorted for it: an interval that has it is narrowed by the few likeliest logits in it, which registers
hold, where those are enough, and else by quarters, for which the row is read again.
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
def four_blocks(p_row, start, num_ids, BLOCK: tl.constexpr):
    """Four blocks of a row from `start` on, all asked for before any is waited for; -inf beyond the row's end."""
    o, left, none = tl.arange(0, BLOCK), num_ids - start, float("-inf")
    p_block = p_row + start + o
    z0 = tl.load(p_block, mask=o < left, other=none, cache_modifier=".cg")
    z1 = tl.load(p_block + BLOCK, mask=o < left - BLOCK, other=none, cache_modifier=".cg")
    z2 = tl.load(p_block + 2 * BLOCK, mask=o < left - 2 * BLOCK, other=none, cache_modifier=".cg")
    z3 = tl.load(p_block + 3 * BLOCK, mask=o < left - 3 * BLOCK, other=none, cache_modifier=".cg")
    return z0, z1, z2, z3


@triton.jit
def row_range(p_row, num_ids, BLOCK: tl.constexpr):
    """Smallest finite and largest of `num_ids` floats at p_row."""
    least = tl.full([BLOCK], float("inf"), tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    start = 0
    while start < num_ids:
        z0, z1, z2, z3 = four_blocks(p_row, start, num_ids, BLOCK)
        y0, y1, y2, y3 = four_blocks(p_row, start + 4 * BLOCK, num_ids, BLOCK)
        best = tl.maximum(best, tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)))
        least = tl.minimum(least, tl.minimum(finite(z0), finite(z1)))
        least = tl.minimum(least, tl.minimum(finite(z2), finite(z3)))
        best = tl.maximum(best, tl.maximum(tl.maximum(y0, y1), tl.maximum(y2, y3)))
        least = tl.minimum(least, tl.minimum(finite(y0), finite(y1)))
        least = tl.minimum(least, tl.minimum(finite(y2), finite(y3)))
        start += 8 * BLOCK
    return tl.min(least, 0), tl.max(best, 0)


@triton.jit
def finite(z):
    """z, with inf where it is -inf."""
    return tl.where(z == float("-inf"), float("inf"), z)


@triton.jit
def weigh(z, largest, COUNT: tl.constexpr):
    """What a logit weighs: 1 each, or exp(z - largest)."""
    return tl.full(z.shape, 1.0, tl.float32) if COUNT else tl.exp(z - largest)


@triton.jit
def weight_from(p_row, num_ids, lowest, largest, BLOCK: tl.constexpr):
    """Sum of exp(z - largest) over the logits not below `lowest`."""
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < num_ids:
        z0, z1, z2, z3 = four_blocks(p_row, start, num_ids, BLOCK)
        y0, y1, y2, y3 = four_blocks(p_row, start + 4 * BLOCK, num_ids, BLOCK)
        total += tl.where(z0 >= lowest, tl.exp(z0 - largest), 0.0) + tl.where(z1 >= lowest, tl.exp(z1 - largest), 0.0)
        total += tl.where(z2 >= lowest, tl.exp(z2 - largest), 0.0) + tl.where(z3 >= lowest, tl.exp(z3 - largest), 0.0)
        total += tl.where(y0 >= lowest, tl.exp(y0 - largest), 0.0) + tl.where(y1 >= lowest, tl.exp(y1 - largest), 0.0)
        total += tl.where(y2 >= lowest, tl.exp(y2 - largest), 0.0) + tl.where(y3 >= lowest, tl.exp(y3 - largest), 0.0)
        start += 8 * BLOCK
    return tl.sum(total, 0)


@triton.jit
def added(z, weight, a, b, c, above_a, above_b, above_c):
    """Three sums of weights, with those of the logits above a, b and c added to them."""
    above_a += tl.where(z > a, weight, 0.0)
    above_b += tl.where(z > b, weight, 0.0)
    above_c += tl.where(z > c, weight, 0.0)
    return above_a, above_b, above_c


@triton.jit
def three_sums(a, b, c):
    """Sums of three tensors `[X]` in one exchange between warps."""
    four = tl.join(tl.join(a, b), tl.join(c, tl.zeros_like(c)))
    # four is [X, 2, 2], of rows ((a, c), (b, 0)).
    a_b, c_0 = tl.split(tl.sum(four, 0))
    sum_a, sum_b = tl.split(a_b)
    sum_c, _ = tl.split(c_0)
    return sum_a, sum_b, sum_c


@triton.jit
def weights_above(p_row, num_ids, a, b, c, largest, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Weight of the logits above a, above b and above c, for one reading of the row."""
    above_a = tl.zeros([BLOCK], tl.float32)
    above_b, above_c = above_a, above_a
    start = 0
    while start < num_ids:
        z0, z1, z2, z3 = four_blocks(p_row, start, num_ids, BLOCK)
        y0, y1, y2, y3 = four_blocks(p_row, start + 4 * BLOCK, num_ids, BLOCK)
        above_a, above_b, above_c = added(z0, weigh(z0, largest, COUNT), a, b, c, above_a, above_b, above_c)
        above_a, above_b, above_c = added(z1, weigh(z1, largest, COUNT), a, b, c, above_a, above_b, above_c)
        above_a, above_b, above_c = added(z2, weigh(z2, largest, COUNT), a, b, c, above_a, above_b, above_c)
        above_a, above_b, above_c = added(z3, weigh(z3, largest, COUNT), a, b, c, above_a, above_b, above_c)
        above_a, above_b, above_c = added(y0, weigh(y0, largest, COUNT), a, b, c, above_a, above_b, above_c)
        above_a, above_b, above_c = added(y1, weigh(y1, largest, COUNT), a, b, c, above_a, above_b, above_c)
        above_a, above_b, above_c = added(y2, weigh(y2, largest, COUNT), a, b, c, above_a, above_b, above_c)
        above_a, above_b, above_c = added(y3, weigh(y3, largest, COUNT), a, b, c, above_a, above_b, above_c)
        start += 8 * BLOCK
    return three_sums(above_a, above_b, above_c)


@triton.jit
def inserted(z, highest, z0, z1, z2, z3):
    """The four largest of four in falling order and z, if that is not above `highest`."""
    z = tl.where(z <= highest, z, float("-inf"))
    z0, z = tl.maximum(z0, z), tl.minimum(z0, z)
    z1, z = tl.maximum(z1, z), tl.minimum(z1, z)
    z2, z = tl.maximum(z2, z), tl.minimum(z2, z)
    return z0, z1, z2, tl.maximum(z3, z)


@triton.jit
def likeliest(p_row, num_ids, highest, BLOCK: tl.constexpr):
    """The four largest logits not above `highest` of each of BLOCK slots: slot i has the ids i, i + BLOCK, ..."""
    b0 = tl.full([BLOCK], float("-inf"), tl.float32)
    b1, b2, b3 = b0, b0, b0
    start = 0
    while start < num_ids:
        z0, z1, z2, z3 = four_blocks(p_row, start, num_ids, BLOCK)
        y0, y1, y2, y3 = four_blocks(p_row, start + 4 * BLOCK, num_ids, BLOCK)
        b0, b1, b2, b3 = inserted(z0, highest, b0, b1, b2, b3)
        b0, b1, b2, b3 = inserted(z1, highest, b0, b1, b2, b3)
        b0, b1, b2, b3 = inserted(z2, highest, b0, b1, b2, b3)
        b0, b1, b2, b3 = inserted(z3, highest, b0, b1, b2, b3)
        b0, b1, b2, b3 = inserted(y0, highest, b0, b1, b2, b3)
        b0, b1, b2, b3 = inserted(y1, highest, b0, b1, b2, b3)
        b0, b1, b2, b3 = inserted(y2, highest, b0, b1, b2, b3)
        b0, b1, b2, b3 = inserted(y3, highest, b0, b1, b2, b3)
        start += 8 * BLOCK
    return b0, b1, b2, b3


@triton.jit
def narrowed(low, high, above, middle, weight, target, COUNT: tl.constexpr):
    """The interval, and the weight above its upper end, once the weight above `middle` is known."""
    is_inside = (low < middle) & (middle < high)
    is_lower = tl.where(weight >= target, False, is_inside)
    low = tl.where(is_inside & (weight >= target), middle, low)
    high, above = tl.where(is_lower, middle, high), tl.where(is_lower, weight, above)
    if COUNT:
        # Exactly the k likeliest are above: any threshold up to the k-th keeps the same tokens.
        high = tl.where(is_inside & (weight == target), middle + 1, high)
    return low, high, above


@triton.jit
def quarters(low, high):
    """Three keys that quarter an interval of keys."""
    width = high - low
    return low + width // 4, low + width // 2, low + width * 3 // 4


@triton.jit
def value_quarters(low, high):
    """Three keys that quarter the interval between two floats, given by their keys."""
    a, b = from_order_key(low.to(tl.int32)), from_order_key(high.to(tl.int32))
    first, second, third = 0.75 * a + 0.25 * b, 0.5 * a + 0.5 * b, 0.25 * a + 0.75 * b
    return order_key(first).to(tl.int64), order_key(second).to(tl.int64), order_key(third).to(tl.int64)


@triton.jit
def smallest_held(z0, z1, z2, z3, target, low, high, largest, COUNT: tl.constexpr):
    """The key of the smallest t in (low, high] for which the logits above t, all in registers, weigh less than the
    target."""
    w0, w1 = weigh(z0, largest, COUNT), weigh(z1, largest, COUNT)
    w2, w3 = weigh(z2, largest, COUNT), weigh(z3, largest, COUNT)
    while high - low > 1:
        a, b, c = quarters(low, high)
        t_a, t_b, t_c = from_order_key(a.to(tl.int32)), from_order_key(b.to(tl.int32)), from_order_key(c.to(tl.int32))
        none = tl.zeros_like(z0)
        above_a, above_b, above_c = added(z0, w0, t_a, t_b, t_c, none, none, none)
        above_a, above_b, above_c = added(z1, w1, t_a, t_b, t_c, above_a, above_b, above_c)
        above_a, above_b, above_c = added(z2, w2, t_a, t_b, t_c, above_a, above_b, above_c)
        above_a, above_b, above_c = added(z3, w3, t_a, t_b, t_c, above_a, above_b, above_c)
        above_a, above_b, above_c = three_sums(above_a, above_b, above_c)
        low, high, _ = narrowed(low, high, 0.0, a, above_a, target, COUNT)
        low, high, _ = narrowed(low, high, 0.0, b, above_b, target, COUNT)
        low, high, _ = narrowed(low, high, 0.0, c, above_c, target, COUNT)
    return high


@triton.jit
def sifted(p_row, num_ids, low, high, above, target, largest, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The interval and the weight above it, narrowed by the likeliest logits in it: to its end where they reach."""
    z0, z1, z2, z3 = likeliest(p_row, num_ids, from_order_key(high.to(tl.int32)), BLOCK)
    # A slot may have more logits than it holds, but none above the last it holds: above `reach` all are held.
    reach = tl.max(z3, 0)
    held = tl.where(z0 > reach, weigh(z0, largest, COUNT), 0.0) + tl.where(z1 > reach, weigh(z1, largest, COUNT), 0.0)
    held += tl.where(z2 > reach, weigh(z2, largest, COUNT), 0.0)
    weight = above + tl.sum(held, 0)
    end = order_key(reach).to(tl.int64)
    reaches = (end <= low) | (weight >= target)
    start = tl.where(reaches, tl.maximum(low, end), high)
    found = smallest_held(z0, z1, z2, z3, target - above, start, high, largest, COUNT)
    high, low = tl.where(reaches, found, end), tl.where(reaches, found - 1, low)
    return low, high, tl.where(reaches, above, weight)


@triton.jit
def smallest_kept(p_row, num_ids, target, lowest, least, largest, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest t for which the logits above t weigh less than the target.

    With COUNT and target k it is the k-th largest logit (top-k); with target p times the whole weight it is the last
    logit of the nucleus (top-p). Tokens exactly as likely as it are kept by `z >= t`.

    Arguments:
        p_row: logits in memory, `[num_ids]` float32.
        target: above 0.
        lowest: logits below it do not count.
        least, largest: the smallest finite logit and the largest.
    """
    low = order_key(tl.maximum(lowest, least)).to(tl.int64) - 1
    high = order_key(largest).to(tl.int64)
    above = tl.full([], 0.0, tl.float32)
    turn = 0
    while high - low > 1:
        if (turn == 0) | (turn == 6):
            # The likeliest may be all it takes, at first or where the interval has become short.
            low, high, above = sifted(p_row, num_ids, low, high, above, target, largest, COUNT, BLOCK)
        else:
            # By value, an interval about 0 soon has few logits; by key, whatever the logits, 16 turns are enough.
            a, b, c = quarters(low, high)
            v_a, v_b, v_c = value_quarters(low, high)
            a, b, c = tl.where(turn < 6, v_a, a), tl.where(turn < 6, v_b, b), tl.where(turn < 6, v_c, c)
            t_a, t_b = from_order_key(a.to(tl.int32)), from_order_key(b.to(tl.int32))
            t_c = from_order_key(c.to(tl.int32))
            w_a, w_b, w_c = weights_above(p_row, num_ids, t_a, t_b, t_c, largest, COUNT, BLOCK)
            low, high, above = narrowed(low, high, above, a, w_a, target, COUNT)
            low, high, above = narrowed(low, high, above, b, w_b, target, COUNT)
            low, high, above = narrowed(low, high, above, c, w_c, target, COUNT)
        turn += 1
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
    # A thread has few registers to spare: four blocks are held, and eight are at work.
    SLOTS: tl.constexpr = BLOCK if BLOCK < 2048 else 2048
    least, largest = row_range(p_row, num_ids, SLOTS)
    threshold = tl.full([], -3.4028234663852886e38, tl.float32)
    if TOP_K:
        wanted = tl.minimum(top_k, num_ids).to(tl.float32)
        threshold = smallest_kept(p_row, num_ids, wanted, threshold, least, largest, True, SLOTS)
    if TOP_P:
        whole = weight_from(p_row, num_ids, threshold, largest, SLOTS)
        threshold = smallest_kept(p_row, num_ids, top_p * whole, threshold, least, largest, False, SLOTS)
    if MIN_P:
        threshold = tl.maximum(threshold, largest + log_min_p)
    return threshold
