"""Memory circuit: what a fast-weight layer reads from the workspace, remembers, and writes back."""

from typing import NamedTuple

from torch import Tensor

from kernels.backend import check_backend
from kernels.linear import RoundedWeights
from kernels.memory_circuit.reference import memory_circuit_reference

__all__ = ["MemoryWeights", "memory_circuit"]


class MemoryWeights(NamedTuple):
    """Weights of the circuit: H heads of width N = D / H.

    in_projection `[4D, D]`, queries, keys, values and gates one above another; forget `[H, D]` and its bias `[H]`;
    write and its bias likewise, None for the Hebbian rule; out_projection `[D, D]`.
    """

    in_projection: Tensor
    forget: Tensor
    forget_bias: Tensor
    write: Tensor | None
    write_bias: Tensor | None
    out_projection: Tensor


def memory_circuit(
    h: Tensor,
    weights: MemoryWeights,
    state: Tensor,
    document_start: Tensor | None = None,
    *,
    rule: str = "hebbian",
    chunk_size: int = 64,
    eps: float = 1e-6,
    rounded: tuple[RoundedWeights, RoundedWeights],
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Project, write and read the fast weights, gate and project back; see `memory_circuit_reference`.

    `rounded` holds the fused form's half-precision copies of the projections from one step to the next; the reference
    has no use for it.
    """
    check_backend(backend)
    if backend == "fused" and h.numel():
        from kernels.memory_circuit.fused import memory_circuit_fused

        return memory_circuit_fused(h, *weights, state, document_start, rule=rule, eps=eps, rounded=rounded)
    return memory_circuit_reference(h, *weights, state, document_start, rule=rule, chunk_size=chunk_size, eps=eps)
