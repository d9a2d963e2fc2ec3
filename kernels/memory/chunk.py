"""What the memory kernels share: the decays of a chunk of L tokens, and queries and keys after their activations."""

import kernels.launch  # noqa: F401, I001  before triton
import triton
import triton.language as tl

from kernels.activation import LOG2_E, sigmoid


@triton.jit
def log2_sigmoid(x):
    """log2(sigmoid(x)) to float32's relative precision.

    The GPU's logarithm is off by 2^-22 near one, a thousandth of the log decay of a state that lives for 10,000 tokens,
    so log(1 + e) = 2 artanh(e / (2 + e)) is summed as a series; e / (2 + e) is at most 1/3.
    """
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    ratio = e / (2.0 + e)
    square = ratio * ratio
    series = 1.0 / 15.0
    series = series * square + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    return (tl.minimum(x, 0.0) - 2.0 * ratio * series) * LOG2_E


@triton.jit
def load_forgetting(logit_ptr, logit_stride, start_ptr, start_stride, offsets, is_token, HAS_STARTS: tl.constexpr):
    """The forget logits of a chunk in float32, and whether each token starts a document (unused without starts)."""
    logit = tl.load(logit_ptr + offsets * logit_stride, mask=is_token, other=0.0).to(tl.float32)
    is_start = is_token
    if HAS_STARTS:
        is_start = tl.load(start_ptr + offsets * start_stride, mask=is_token, other=0) != 0
    return logit, is_start


@triton.jit
def chunk_decay(logit, is_start, is_token, HAS_STARTS: tl.constexpr):
    """Running sums of log2 decay over a chunk, as a coarse and a fine part, and their totals.

    The coarse part holds multiples of 1/64, which float32 adds exactly, so the decay between two tokens is exact to
    rounding however much was forgotten before them. A document's start is a decay of 2^-1000: zero in float32.
    """
    log_decay = tl.maximum(log2_sigmoid(logit), -1000.0)
    log_decay = tl.where(is_token, log_decay, 0.0)
    if HAS_STARTS:
        log_decay = tl.where(is_start, -1000.0, log_decay)
    coarse = tl.floor(log_decay * 64.0) * 0.015625
    fine = log_decay - coarse
    return tl.cumsum(coarse, 0), tl.cumsum(fine, 0), tl.sum(coarse, 0), tl.sum(fine, 0)


@triton.jit
def decay_between(coarse, fine, causal):
    """`[L, L]`: decay from token j to token i >= j, zero elsewhere and across a document's start."""
    difference = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return tl.where(causal, tl.exp2(tl.minimum(difference, 0.0)), 0.0)


@triton.jit
def load_tile(ptr, row_stride, rows, columns, is_token):
    """`[L, width]` of a tensor whose last dimension is contiguous, zero beyond the last token."""
    return tl.load(ptr + rows[:, None] * row_stride + columns[None, :], mask=is_token[:, None], other=0.0)


@triton.jit
def load_transposed(ptr, row_stride, rows, columns, is_token):
    """`[width, L]`, as `load_tile` but transposed."""
    return tl.load(ptr + rows[None, :] * row_stride + columns[:, None], mask=is_token[None, :], other=0.0)


@triton.jit
def silu_and_norm(x, eps):
    """silu(x) `[L, N]` and one over its l2norm `[L]`, in float32."""
    raw = x.to(tl.float32)
    activity = raw * sigmoid(raw)
    return activity, tl.rsqrt(tl.sum(activity * activity, 1) + eps)


@triton.jit
def normalized_silu(x, eps):
    """l2norm(silu(x)) over the last dimension, in x's type."""
    activity, inverse_norm = silu_and_norm(x, eps)
    return (activity * inverse_norm[:, None]).to(x.dtype)
