"""Generate: many tokens of a whole brain in one launch."""

from collections.abc import Callable

from torch import Tensor

from kernels.backend import check_backend
from kernels.generate.layout import BrainShape, GenerateOutput, PackedBrain, PackedState
from kernels.generate.reference import generate_reference
from kernels.sample import Sampling

__all__ = ["BrainShape", "GenerateOutput", "PackedBrain", "PackedState", "generate"]


def generate(
    brain: PackedBrain,
    state: PackedState,
    token_ids: Tensor,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seed: int,
    lanes: Tensor,
    stop_ids: Tensor,
    seen: Tensor | None = None,
    backend: str = "reference",
) -> GenerateOutput:
    """Read one token a lane, draw the next, read that, and so on; see `generate_reference` for shapes."""
    check_backend(backend)
    run: Callable[..., GenerateOutput] = generate_reference
    if backend == "fused":
        from kernels.generate.fused import generate_fused

        run = generate_fused
    return run(
        brain,
        state,
        token_ids,
        sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        lanes=lanes,
        stop_ids=stop_ids,
        seen=seen,
    )
