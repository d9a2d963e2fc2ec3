"""Linear: what circuits share of their projections."""

from torch import Tensor

from kernels.backend import check_backend
from kernels.linear.beside import (
    HOLDS_HALF_GRADIENTS,
    handed_over,
    idle_gpu,
    product_gradients,
    stored_dtype,
    sum_gradient,
    weight_gradients_beside,
)
from kernels.linear.products import add_product, product
from kernels.linear.reference import linear, one_copy_a_weight
from kernels.linear.rounded import RoundedWeights
from kernels.precision import full_precision_linear as _reference

__all__ = [
    "HOLDS_HALF_GRADIENTS",
    "RoundedWeights",
    "add_product",
    "full_precision_linear",
    "handed_over",
    "idle_gpu",
    "linear",
    "one_copy_a_weight",
    "product",
    "product_gradients",
    "stored_dtype",
    "sum_gradient",
    "weight_gradients_beside",
]


def full_precision_linear(h: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "reference") -> Tensor:
    """h W^T + b in the weight's type for a few rows of weight `[H, D]`, kept out of autocast: for quantities whose
    rounding would be felt over thousands of tokens. h is `[..., D]`, the result `[..., H]`."""
    check_backend(backend)
    if backend == "fused" and h.numel():
        from kernels.linear.full_precision import full_precision_linear_fused

        return full_precision_linear_fused(h, weight, bias)
    return _reference(h, weight, bias)
