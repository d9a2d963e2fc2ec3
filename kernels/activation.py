"""Activations inside kernels."""

import kernels.launch  # noqa: F401, I001  before triton
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of a float32; a reciprocal square root costs one instruction where a division costs several."""
    denominator = 1.0 + tl.exp2(x * -LOG2_E)
    return tl.rsqrt(denominator * denominator)
