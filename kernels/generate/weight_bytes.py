"""int8 weights in the products: a byte becomes a float32 by one instruction, as the fraction of a subnormal number.

A weight w from -127 to 127 is stored as the byte b = w + 128. Placed in bits 16 to 23 of a float32, all others zero,
it is b 2^-133 exactly: a byte below 128 leaves the exponent 0, and one above makes it 1, whose step is the same. So
there is nothing to subtract and no conversion, which takes four times an instruction's time. Multiply-adds take
subnormal factors at full rate and lose nothing; that sums do not become subnormal, activations are multiplied by
UNIT = 2^64 beforehand. What b has more than w is the same for all rows: -128 times the sum of the activations at one
place, which products begin with. What is left over, 2^69, a row's scale takes away (`BYTE_SUM`).
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.generate.packets import append

_UNIT = 2.0**64
BYTE_SUM = 2.0**133 / _UNIT  # times a sum of products: what it is of weights and activations
EXCESS_OF_BYTE = tl.constexpr(-(2.0**-126))  # 128 as a byte is


def as_bytes(weights: Tensor) -> Tensor:
    """int8 as uint8, 128 more each, in the same memory."""
    return weights.view(torch.uint8).bitwise_xor_(128)


@triton.constexpr_function
def activation_unit(INT8):
    """What activations are multiplied by."""
    return _UNIT if INT8 else 1.0


@triton.jit
def weight_of(w, INT8: tl.constexpr):
    """Weights in float32; with INT8 their bytes, times 2^-133. (`kernels.generate.ring` does it by one instruction.)"""
    if INT8:
        return (w.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return w.to(tl.float32)


@triton.jit
def excess_of(x, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """What the sums of a turn begin with: a tuple of GROUPS tensors, one for each group of GROUP neighbours among as
    many activations, and as many again, in the tuple x."""
    out = ()
    for i in tl.static_range(GROUPS):
        total = x[i * GROUP] * 0.0
        for j in tl.static_range(0, len(x), GROUP * GROUPS):
            for k in tl.static_range(GROUP):
                total += x[j + i * GROUP + k]
        out = append(out, total * EXCESS_OF_BYTE)
    return out
