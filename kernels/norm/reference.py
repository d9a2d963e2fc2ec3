"""Residual addition and RMS normalisation, in plain torch."""

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype, rms_normalize


def add_norm_reference(
    x: Tensor, delta: Tensor | None = None, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """total = x + delta, normed = total / sqrt(mean(total^2) + eps) over the last dimension.

    Arguments:
        x: the workspace, `[..., D]`.
        delta: what a circuit writes to it, of the same shape; None for nothing.
        eps: added to the mean square.
        out_dtype: type of normed; x's if None.

    Returns:
        total `[..., D]` in x's type, x itself without a delta, and normed `[..., D]`, made from the total before it is
        rounded to x's type.
    """
    dtype = accumulation_dtype(x)
    total = x.to(dtype) if delta is None else x.to(dtype) + delta.to(dtype)
    normed = rms_normalize(total, eps).to(out_dtype or x.dtype)
    return x if delta is None else total.to(x.dtype), normed
