"""Sample: hidden states to the next token of each lane."""

from torch import Tensor

from kernels.backend import check_backend
from kernels.sample.reference import SampleOutput, Sampling, processed_logits, sample_logits, sample_reference

__all__ = ["SampleOutput", "Sampling", "processed_logits", "sample", "sample_logits"]


def sample(
    hidden: Tensor,
    weight: Tensor,
    sampling: Sampling,
    *,
    seed: int,
    lanes: Tensor,
    positions: Tensor,
    seen: Tensor | None = None,
    backend: str = "reference",
) -> SampleOutput:
    """Decode one position a lane and draw its token; see `sample_reference` and `sample_logits`."""
    check_backend(backend)
    if backend == "fused":
        from kernels.sample.fused import sample_fused

        return sample_fused(hidden, weight, sampling, seed=seed, lanes=lanes, positions=positions, seen=seen)
    return sample_reference(hidden, weight, sampling, seed=seed, lanes=lanes, positions=positions, seen=seen)
