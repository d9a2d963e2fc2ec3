"""MLP: a layer's SwiGLU with its two projections."""

from torch import Tensor

from kernels.backend import check_backend
from kernels.linear import RoundedWeights
from kernels.mlp.reference import mlp_reference

__all__ = ["mlp"]


def mlp(
    h: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    *,
    rounded: tuple[RoundedWeights, RoundedWeights],
    backend: str = "reference",
) -> Tensor:
    """W_out (silu(g) * u) with [g, u] = W_in h; see `mlp_reference` for shapes.

    `rounded` holds the fused form's half-precision copies of the two weights from one step to the next; the reference
    has no use for it.
    """
    check_backend(backend)
    if backend == "fused":
        from kernels.mlp.fused import mlp_fused

        return mlp_fused(h, in_weight, out_weight, rounded=rounded)
    return mlp_reference(h, in_weight, out_weight)
