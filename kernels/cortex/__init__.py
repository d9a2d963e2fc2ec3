"""Cortex: a scan of spiking hyper-columns over a whole sequence."""

from torch import Tensor

from kernels.backend import check_backend
from kernels.cortex.reference import CortexOutput, CortexState, cortex_reference
from kernels.cortex.spike import CEILINGS, GRADED_CEILING, SPIKES

__all__ = ["CEILINGS", "GRADED_CEILING", "SPIKES", "CortexOutput", "CortexState", "cortex"]


def cortex(
    drive: Tensor,
    lateral_weight: Tensor,
    decay: Tensor,
    state: CortexState,
    document_start: Tensor | None = None,
    *,
    spike_kind: str = "graded",
    threshold: float = 0.5,
    adaptation_strength: float = 0.5,
    adaptation_decay: float = 0.95,
    backend: str = "reference",
) -> CortexOutput:
    """Run spiking hyper-columns through a sequence; see `cortex_reference` for shapes and formulas."""
    check_backend(backend)
    run = cortex_reference
    if backend == "fused":
        from kernels.cortex.fused import cortex_fused as run  # here, because the reference works without Triton
    return run(
        drive,
        lateral_weight,
        decay,
        state,
        document_start,
        spike_kind=spike_kind,
        threshold=threshold,
        adaptation_strength=adaptation_strength,
        adaptation_decay=adaptation_decay,
    )
