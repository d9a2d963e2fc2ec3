"""Decoder: Broca's output to logits, loss or a token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.decode import DecodeOutput, decode
from kernels.linear import RoundedWeights
from kernels.norm import add_norm
from kernels.sample import SampleOutput, Sampling, sample
from neurogen.brain.config import BrainConfig
from neurogen.brain.regions import activation_dtype


class Decoder(nn.Module):
    """logits = W rms(x), W `[V, D]` of its own (zero at the start) or the embedding's."""

    def __init__(self, config: BrainConfig, vocab_size: int, tied_weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.rounded_weights = (RoundedWeights(),)
        self.weight = (
            nn.Parameter(torch.zeros(vocab_size, config.embedding_dim)) if tied_weight is None else tied_weight
        )

    def forward(self, broca_output: Tensor) -> Tensor:
        """`[..., D]` to logits `[..., V]`."""
        return F.linear(self._normed(broca_output, "reference"), self.weight)

    def loss(self, broca_output: Tensor, target_ids: Tensor, backend: str) -> DecodeOutput:
        """`[B, T, D]` and targets `[B, T]` to mean cross-entropy and arg-max hits."""
        normed = self._normed(broca_output, backend)
        return decode(normed, self.weight, target_ids, rounded=self.rounded_weights[0], backend=backend)

    def decode_and_sample(
        self,
        broca_output: Tensor,
        sampling: Sampling,
        *,
        seed: int,
        lanes: Tensor,
        positions: Tensor,
        seen: Tensor | None = None,
        backend: str = "reference",
    ) -> SampleOutput:
        """One position a lane, `[B, D]`, to a token drawn for each; see `kernels.sample` for the arguments."""
        return sample(
            self._normed(broca_output, backend),
            self.weight,
            sampling,
            seed=seed,
            lanes=lanes,
            positions=positions,
            seen=seen,
            backend=backend,
        )

    def _normed(self, broca_output: Tensor, backend: str) -> Tensor:
        return add_norm(broca_output, eps=self.eps, out_dtype=activation_dtype(broca_output), backend=backend).normed
