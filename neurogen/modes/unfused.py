"""Whole-sequence torch operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels.decode import DecodeOutput
from kernels.sample import SampleOutput, Sampling, sample_logits
from neurogen.brain import Brain, BrainOutput, BrainState, Decoder, TokenEmbedding
from neurogen.generation.loop import PolledReader, token_loop
from neurogen.probes import stage

if TYPE_CHECKING:
    from neurogen.generation import Generation, Request
    from neurogen.model import NeuroGen


class UnfusedMode:
    """The reference kernels over whole sequences: no Triton.

    Nothing in a sequence waits for the device: the caller's reading of the loss, or of the tokens, is its one
    synchronisation.
    """

    name = "unfused"
    backend = "reference"

    def sequence(
        self,
        brain: Brain,
        embedding: TokenEmbedding,
        input_ids: Tensor,
        state: BrainState,
        document_start: Tensor | None,
    ) -> BrainOutput:
        with stage("embed"):
            x, recent_ids = brain.thalamus(input_ids, embedding.weight, state.recent_ids, document_start, self.backend)
        with stage("cognitive_step"):
            return brain.think(x, recent_ids, state, document_start, backend=self.backend)

    def loss(self, decoder: Decoder, broca_output: Tensor, target_ids: Tensor) -> DecodeOutput:
        with stage("decode"):
            return decoder.loss(broca_output, target_ids, self.backend)

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
        with stage("decode"):
            logits = decoder(broca_output)
        with stage("sample"):
            return sample_logits(logits, sampling, seed=seed, lanes=lanes, positions=positions, seen=seen)

    def generate(self, model: NeuroGen, request: Request) -> Generation:
        """The prompt as one sequence, then a sequence of one token at a time; tokens stay on the device."""
        return token_loop(model, request, PolledReader(request, model.device))
