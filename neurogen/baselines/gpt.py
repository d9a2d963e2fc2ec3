"""A transformer of the kind commonly trained today: RMSNorm, rotary positions, SwiGLU, scaled-dot-product attention."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.decode import DecodeOutput
from kernels.segments import segment_index
from neurogen.baselines.base import Baseline
from neurogen.baselines.config import GPTConfig
from neurogen.brain import BrainState
from neurogen.brain.dropout import Dropout
from neurogen.brain.state import LayerState
from neurogen.model import Output

ROTARY_BASE = 10_000.0
Rotation = tuple[Tensor, Tensor]  # cosines and sines [T, N/2]


class GPT(Baseline):
    """Attends within its window and carries nothing from one to the next.

    Projections back to the residual stream and the decoder start at zero, as in the brain it is compared with.

    Arguments:
        config: sizes.
        vocab_size: V.
        mask_documents: whether a token sees its own document alone. It has a price, for the mask keeps attention from
            its fastest kernel; text that marks no documents needs none, and then `document_start` is not looked at.
        context: tokens of the windows it trains on, which its FLOPs depend on.
    """

    def __init__(self, config: GPTConfig, *, vocab_size: int, mask_documents: bool = True, context: int = 0) -> None:
        super().__init__(vocab_size=vocab_size)
        self.config = config
        self.mask_documents = mask_documents
        self.context = context
        self._angles: Rotation | None = None
        self.embedding = nn.Embedding(vocab_size, config.embedding_dim)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(GPTLayer(config) for _ in range(config.num_layers))
        self.decoder = nn.Linear(config.embedding_dim, vocab_size, bias=False)
        nn.init.zeros_(self.decoder.weight)
        self._compiled = torch.compile(self._measure) if config.compile and torch.cuda.is_available() else self._measure

    def hidden(
        self, input_ids: Tensor, state: BrainState, document_start: Tensor | None
    ) -> tuple[Tensor, dict[str, LayerState]]:
        rotation = self._rotation(input_ids.shape[1], input_ids.device)
        return self._trunk(input_ids, document_start if self.mask_documents else None, rotation), {}

    def measure(
        self, input_ids: Tensor, state: BrainState, document_start: Tensor | None, target_ids: Tensor
    ) -> tuple[DecodeOutput, dict[str, LayerState]]:
        # Training's windows have one shape; evaluation ends with a shorter one, which would be compiled as well.
        run = self._compiled if input_ids.is_cuda and torch.is_grad_enabled() else self._measure
        rotation = self._rotation(input_ids.shape[1], input_ids.device)
        return DecodeOutput(*run(input_ids, document_start if self.mask_documents else None, target_ids, rotation)), {}

    def _rotation(self, num_tokens: int, device: torch.device) -> Rotation:
        """The angles of the window, made once: inside what is compiled they would be taken again for every element."""
        if self._angles is None or self._angles[0].shape[0] != num_tokens or self._angles[0].device != device:
            self._angles = rotary_angles(num_tokens, self.config.head_width, device)
        return self._angles

    def _measure(
        self, input_ids: Tensor, document_start: Tensor | None, target_ids: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, num_correct, num_targets = self.decode(self._trunk(input_ids, document_start, rotation), target_ids)
        return loss, num_correct, num_targets

    def _trunk(self, input_ids: Tensor, document_start: Tensor | None, rotation: Rotation) -> Tensor:
        eps = self.config.norm_eps
        mask = None
        if document_start is not None:
            segment = segment_index(document_start)
            mask = (segment[:, None, :, None] == segment[:, None, None, :]).tril()
        x = self.dropout(rms(self.embedding(input_ids), eps))
        for layer in self.layers:
            x = layer(x, rotation, mask)
        return rms(x, eps)

    def next_logits(self, text: Tensor, state: BrainState, *, num_new: int) -> Output:
        """Reads the whole text again: there is no cache of keys and values."""
        out = self(text, state)
        return dataclasses.replace(out, state=BrainState(state.position + num_new, state.recent_ids))

    def flops_per_token(self) -> int:
        """Forward and backward: six a weight of a product, and 12 L D T/2 of causal attention over T = context
        (Chowdhery 2022)."""
        weights = self.num_parameters() - self.embedding.weight.numel()
        return 6 * weights + 6 * self.config.num_layers * self.config.embedding_dim * self.context


class GPTLayer(nn.Module):
    """Attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_dim
        hidden = max(64, round(config.mlp_ratio * width / 64) * 64)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)
        self.dropout = Dropout(config.dropout)
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None) -> Tensor:
        query, key, value = self.heads(x, rotation)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=mask is None,
        )
        return self.feed_forward(x + self.dropout(self.attention_out(attended.transpose(1, 2).flatten(-2))))

    def heads(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, `[B, H, T, N]` each, of x `[B, T, D]`."""
        eps = self.config.norm_eps
        heads = self.query_key_value(rms(x, eps)).unflatten(-1, (3, -1, self.config.head_width))
        query, key, value = heads.transpose(1, 3).unbind(2)
        return rotate(rms(query, eps), rotation), rotate(rms(key, eps), rotation), value

    def feed_forward(self, x: Tensor) -> Tensor:
        """x and what the SwiGLU adds to it."""
        up, gate = self.mlp_in(rms(x, self.config.norm_eps)).chunk(2, dim=-1)
        return x + self.dropout(self.mlp_out(F.silu(gate) * up))


def rms(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square, in x's type."""
    return F.rms_norm(x, x.shape[-1:], eps=eps).to(x.dtype)


def rotary_angles(num_tokens: int, head_width: int, device: torch.device) -> Rotation:
    """Cosines and sines `[T, N/2]` of t * base^(-2i/N) (Su et al. 2021)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_width, 2, device=device).float() / head_width)
    angles = torch.arange(num_tokens, device=device).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn channel pairs (i, i + N/2) of `[..., T, N]` by their token's angles."""
    cos, sin = (r.to(x.dtype) for r in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
