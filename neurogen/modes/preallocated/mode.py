"""The mode called preallocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels.decode import DecodeOutput
from neurogen.brain import Brain, BrainOutput, BrainState, Decoder, TokenEmbedding
from neurogen.modes.preallocated.generate import generate_in_buffers
from neurogen.modes.preallocated.loss import sequence_loss
from neurogen.modes.preallocated.sequence import run_sequence
from neurogen.modes.unfused import UnfusedMode

if TYPE_CHECKING:
    from neurogen.generation import Generation, Request
    from neurogen.model import NeuroGen


class PreallocatedMode(UnfusedMode):
    """Token by token; every buffer is made once a sequence and written in place, and no token allocates.

    Training keeps every token's values in buffers `[T, ...]` and goes back through them with a reverse pass of its own.
    Generation writes tokens to a buffer on the device. Nothing waits for the device: one synchronisation a sequence,
    the caller's.
    """

    name = "preallocated"

    def sequence(
        self,
        brain: Brain,
        embedding: TokenEmbedding,
        input_ids: Tensor,
        state: BrainState,
        document_start: Tensor | None,
    ) -> BrainOutput:
        return run_sequence(brain, embedding, input_ids, state, document_start)

    def loss(self, decoder: Decoder, broca_output: Tensor, target_ids: Tensor) -> DecodeOutput:
        return sequence_loss(decoder, broca_output, target_ids)

    def generate(self, model: NeuroGen, request: Request) -> Generation:
        """The prompt token by token, then a token at a time, all in the same buffers."""
        return generate_in_buffers(model, request)
