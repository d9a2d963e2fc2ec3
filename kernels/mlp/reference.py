"""SwiGLU with its projections, in plain torch."""

from torch import Tensor

from kernels.linear import linear
from kernels.swiglu import swiglu


def mlp_reference(h: Tensor, in_weight: Tensor, out_weight: Tensor) -> Tensor:
    """W_out (silu(g) * u) with [g, u] = W_in h (Shazeer 2020).

    Arguments:
        h: `[..., D]`.
        in_weight: `[2F, D]`, gates above values.
        out_weight: `[D, F]`.

    Returns:
        `[..., D]`.
    """
    return linear(swiglu(linear(h, in_weight)), out_weight)
