"""SwiGLU: the activation between an MLP's two projections."""

from torch import Tensor

from kernels.backend import check_backend
from kernels.swiglu.reference import swiglu_reference

__all__ = ["swiglu"]


def swiglu(gate_and_value: Tensor, *, backend: str = "reference") -> Tensor:
    """Gate a value; see `swiglu_reference` for shapes and formula."""
    check_backend(backend)
    if backend == "fused":
        from kernels.swiglu.fused import swiglu_fused

        return swiglu_fused(gate_and_value)
    return swiglu_reference(gate_and_value)
