"""A stacked LSTM (cuDNN on a GPU)."""

import torch.nn.functional as F
from torch import Tensor, nn


class LSTM(nn.Module):
    """Token ids `[B, T]` to logits `[B, T, V]`, or with targets to the mean cross-entropy in nats."""

    def __init__(self, *, embedding_dim: int, num_layers: int, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.lstm = nn.LSTM(embedding_dim, embedding_dim, num_layers, batch_first=True)
        self.decoder = nn.Linear(embedding_dim, vocab_size)

    def forward(self, input_ids: Tensor, target_ids: Tensor | None = None) -> Tensor:
        hidden, _ = self.lstm(self.embedding(input_ids))
        logits = self.decoder(hidden)
        if target_ids is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), target_ids.flatten(), ignore_index=-100)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
