"""Cortex circuit: what a spiking layer reads from the workspace, thinks, and writes back."""

from typing import NamedTuple

from torch import Tensor

from kernels.backend import check_backend
from kernels.cortex import CortexState
from kernels.cortex_circuit.reference import CortexCircuitOutput, cortex_circuit_reference
from kernels.linear import RoundedWeights

__all__ = ["CortexCircuitOutput", "CortexWeights", "cortex_circuit"]


class CortexWeights(NamedTuple):
    """Weights of the circuit: D neurons in K columns of C.

    in_projection `[2D, D]`, drives above gates; drive_bias `[D]`; lateral `[K, C, C]`; decay `[D]` in (0, 1);
    out_projection `[D, D]`.
    """

    in_projection: Tensor
    drive_bias: Tensor
    lateral: Tensor
    decay: Tensor
    out_projection: Tensor


def cortex_circuit(
    h: Tensor,
    weights: CortexWeights,
    state: CortexState,
    document_start: Tensor | None = None,
    go: Tensor | None = None,
    *,
    spike_kind: str = "graded",
    threshold: float = 0.5,
    adaptation_strength: float = 0.5,
    adaptation_decay: float = 0.95,
    eps: float = 1e-6,
    rounded: tuple[RoundedWeights, RoundedWeights],
    backend: str = "reference",
) -> CortexCircuitOutput:
    """Project, run the spiking columns, gate and project back; see `cortex_circuit_reference`.

    `rounded` holds the fused form's half-precision copies of the two projections from one step to the next; the
    reference has no use for it.
    """
    check_backend(backend)
    options = (spike_kind, threshold, adaptation_strength, adaptation_decay, eps)
    if backend == "fused" and h.numel():
        from kernels.cortex_circuit.fused import cortex_circuit_fused

        return cortex_circuit_fused(h, *weights, state, document_start, go, *options, rounded=rounded)
    return cortex_circuit_reference(h, *weights, state, document_start, go, *options)
