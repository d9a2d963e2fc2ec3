"""Whole-sequence torch operations."""

from torch import Tensor

from neurogen.brain import Brain, BrainOutput, BrainState, TokenEmbedding


class UnfusedMode:
    """The reference kernels over whole sequences: no Triton, no synchronisation inside a sequence."""

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
        return brain(input_ids, embedding, state, document_start, backend=self.backend)
