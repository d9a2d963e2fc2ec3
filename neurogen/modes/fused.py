"""Whole-sequence Triton launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels.sample import SampleOutput, Sampling
from neurogen.brain import Decoder
from neurogen.generation.launch import launch_or_loop
from neurogen.modes.unfused import UnfusedMode

if TYPE_CHECKING:
    from neurogen.generation import Generation, Request
    from neurogen.model import NeuroGen


class FusedMode(UnfusedMode):
    """The fused kernels over whole sequences; like `UnfusedMode` in what it asks of the host.

    Without a GPU the same kernels run in Triton's interpreter, in float32 and slowly: for trying, not for training.
    """

    name = "fused"
    backend = "fused"

    def draw(
        self,
        decoder: Decoder,
        broca_output: Tensor,
        sampling: Sampling,
        *,
        seed: int,
        lanes: Tensor,
        positions: Tensor,
        seen: Tensor | None,
    ) -> SampleOutput:
        return decoder.decode_and_sample(
            broca_output,
            sampling,
            seed=seed,
            lanes=lanes,
            positions=positions,
            seen=seen,
            backend=self.backend,
        )

    def generate(self, model: NeuroGen, request: Request) -> Generation:
        """The prompt as one sequence, then all tokens in one launch."""
        return launch_or_loop(model, request)
