"""Norm: add to the workspace and normalise it for the next reader."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import check_backend
from kernels.norm.reference import add_norm_reference

__all__ = ["AddNormOutput", "add_norm"]


class AddNormOutput(NamedTuple):
    """The sum, and the sum divided by its root mean square."""

    total: Tensor
    normed: Tensor


def add_norm(
    x: Tensor,
    delta: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    backend: str = "reference",
) -> AddNormOutput:
    """Residual addition and RMS normalisation; see `add_norm_reference` for shapes and formula."""
    check_backend(backend)
    if backend == "fused":
        from kernels.norm.fused import add_norm_fused

        return AddNormOutput(*add_norm_fused(x, delta, eps=eps, out_dtype=out_dtype))
    return AddNormOutput(*add_norm_reference(x, delta, eps=eps, out_dtype=out_dtype))
