"""Whole-sequence Triton launches."""

from torch import Tensor

from neurogen.brain import Brain, BrainOutput, BrainState, TokenEmbedding


class FusedMode:
    """The fused kernels over whole sequences: the number of launches does not depend on the sequence's length."""

    name = "fused"
    backend = "fused"

    def sequence(
        self,
        brain: Brain,
        embedding: TokenEmbedding,
        input_ids: Tensor,
        state: BrainState,
        document_start: Tensor | None,
    ) -> BrainOutput:
        return brain(input_ids, embedding, state, document_start, backend=self.backend)
