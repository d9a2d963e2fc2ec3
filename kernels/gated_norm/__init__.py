"""Gated norm: a circuit's activity, normalised by column or head and gated."""

from torch import Tensor

from kernels.backend import check_backend
from kernels.gated_norm.fused import gated_norm_fused
from kernels.gated_norm.reference import gated_norm_reference

__all__ = ["gated_norm"]


def gated_norm(
    x: Tensor,
    gate: Tensor,
    *,
    group_size: int,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "reference",
) -> Tensor:
    """Normalise x by group and gate it; see `gated_norm_reference` for shapes and formula."""
    check_backend(backend)
    implementation = gated_norm_fused if backend == "fused" else gated_norm_reference
    return implementation(x, gate, group_size=group_size, scale=scale, eps=eps)
