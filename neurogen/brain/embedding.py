"""Token embedding: one row of width D per id."""

import torch
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """E, `[V, D]`; rows are normalised by the relay, so their scale is free and only directions matter.

    Arguments:
        vocab_size: V.
        embedding_dim: D.
        std: standard deviation at the start; 1/sqrt(D) when the decoder shares the weight, so that logits start small.
    """

    def __init__(self, vocab_size: int, embedding_dim: int, *, std: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, embedding_dim) * std)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids `[...]` to rows `[..., D]`, not normalised."""
        return nn.functional.embedding(input_ids, self.weight)
