"""A GPT one token at a time, with the keys and values of its past in buffers of fixed size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from neurogen.baselines.gpt import GPT, ROTARY_BASE, GPTLayer, rms
from neurogen.errors import UserError


@dataclass(frozen=True)
class KeyValueCache:
    """What a GPT keeps of B lanes' past, for S tokens at most.

    Arguments:
        keys, values: of each layer, `[B, H, S, N]`, keys turned by their positions. They are tensors of their own, not
            one stacked: a compiler that cannot prove writes to slices of one tensor apart copies all of it.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def empty(cls, model: GPT, lanes: int, capacity: int) -> KeyValueCache:
        """Zeros on the model's device and in its type."""
        config, weight = model.config, model.decoder.weight
        if capacity < 1:
            raise UserError(f"capacity is {capacity}; a cache holds at least 1 token")
        shape = (lanes, config.embedding_dim // config.head_width, capacity, config.head_width)

        def buffers() -> tuple[Tensor, ...]:
            return tuple(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(config.num_layers))

        return cls(buffers(), buffers())

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def bytes_read(self, num_tokens: int) -> int:
        """Bytes of the first `num_tokens` tokens of every lane."""
        return sum(x[:, :, :1].numel() * x.element_size() * num_tokens for x in (*self.keys, *self.values))


def decode_step(model: GPT, token_ids: Tensor, position: Tensor, cache: KeyValueCache, *, fused: bool = True) -> Tensor:
    """One token a lane: ids `[B]` to logits `[B, V]`; the token's keys and values are written into the cache.

    Every size is fixed and nothing is read on the host, so a step compiles once and can be recorded in a CUDA graph.

    Arguments:
        position: 0-dimensional int64 on the model's device, tokens read before, below the cache's capacity; the same
            in every lane.
        fused: whether attention is torch's scaled_dot_product_attention, or two products and a softmax, which a
            compiler may spread wider where there are few lanes.
    """
    config = model.config
    eps = config.norm_eps
    frequencies = ROTARY_BASE ** (
        -torch.arange(0, config.head_width, 2, device=token_ids.device).float() / config.head_width
    )
    angles = position.float() * frequencies
    rotation = angles.cos()[None], angles.sin()[None]
    visible = torch.arange(cache.capacity, device=token_ids.device)[None, :] <= position  # [1, S]
    x = rms(model.embedding(token_ids), eps)[:, None]
    for layer, keys, values in zip(model.layers, cache.keys, cache.values):
        assert isinstance(layer, GPTLayer)
        query, key, value = layer.heads(x, rotation)
        keys[:, :, position[None]] = key
        values[:, :, position[None]] = value
        if fused:
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
        else:
            scores = (query @ keys.transpose(-1, -2)).float() * config.head_width**-0.5
            attended = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(values.dtype) @ values
        x = layer.feed_forward(x + layer.attention_out(attended.transpose(1, 2).flatten(-2)))
    return model.decoder(rms(x[:, 0], eps))
