"""A transformer of the kind commonly trained today: RMSNorm, rotary positions, SwiGLU, scaled-dot-product attention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurogen.errors import UserError

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT.

    Arguments:
        embedding_dim: D.
        num_layers: at least 1.
        head_width: divides D; even, since rotary positions turn pairs of channels.
        mlp_ratio: hidden width of SwiGLU over D, rounded to a multiple of 64.
        norm_eps: added to mean squares.
    """

    embedding_dim: int = 512
    num_layers: int = 6
    head_width: int = 64
    mlp_ratio: float = 8 / 3
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"num_layers is {self.num_layers}; a GPT needs at least 1")
        if self.head_width % 2 or self.embedding_dim % self.head_width:
            raise UserError(
                f"head_width is {self.head_width}; it must be even and divide embedding_dim = {self.embedding_dim}"
            )


class GPT(nn.Module):
    """Token ids `[B, T]` to logits `[B, T, V]`, or with targets to the mean cross-entropy in nats.

    Projections back to the residual stream and the decoder start at zero, as in the brain it is compared with.
    """

    def __init__(self, config: GPTConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.embedding_dim)
        self.layers = nn.ModuleList(GPTLayer(config) for _ in range(config.num_layers))
        self.decoder = nn.Linear(config.embedding_dim, vocab_size, bias=False)
        nn.init.zeros_(self.decoder.weight)

    def forward(self, input_ids: Tensor, target_ids: Tensor | None = None) -> Tensor:
        x = rms(self.embedding(input_ids), self.config.norm_eps)
        rotation = rotary_angles(input_ids.shape[1], self.config.head_width, x.device)
        for layer in self.layers:
            x = layer(x, rotation)
        logits = self.decoder(rms(x, self.config.norm_eps))
        if target_ids is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), target_ids.flatten(), ignore_index=-100)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, context: int) -> int:
        """Forward and backward: six a weight of a product, and 12 L D T/2 of causal attention (Chowdhery 2022)."""
        weights = self.num_parameters() - self.embedding.weight.numel()
        return 6 * weights + 6 * self.config.num_layers * self.config.embedding_dim * context


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
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.heads(x, rotation)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.feed_forward(x + self.attention_out(attended.transpose(1, 2).flatten(-2)))

    def heads(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, `[B, H, T, N]` each, of x `[B, T, D]`."""
        eps = self.config.norm_eps
        heads = self.query_key_value(rms(x, eps)).unflatten(-1, (3, -1, self.config.head_width))
        query, key, value = heads.transpose(1, 3).unbind(2)
        return rotate(rms(query, eps), rotation), rotate(rms(key, eps), rotation), value

    def feed_forward(self, x: Tensor) -> Tensor:
        """x and what the SwiGLU adds to it."""
        up, gate = self.mlp_in(rms(x, self.config.norm_eps)).chunk(2, dim=-1)
        return x + self.mlp_out(F.silu(gate) * up)


def rms(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square, in x's type."""
    return F.rms_norm(x, x.shape[-1:], eps=eps).to(x.dtype)


def rotary_angles(num_tokens: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, N/2]` of t * base^(-2i/N) (Su et al. 2021)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_width, 2, device=device).float() / head_width)
    angles = torch.arange(num_tokens, device=device).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs (i, i + N/2) of `[..., T, N]` by their token's angles."""
    cos, sin = (r.to(x.dtype) for r in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
