"""Counter-based draws (Philox-4x32-10, Salmon et al. 2011) in integer torch arithmetic, alike on every device."""

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_NUM_ROUNDS = 10


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """First 32-bit word of Philox-4x32-10 at counter (c0, c1, c2, 0) under a 64-bit key.

    Arguments:
        seed: key, taken modulo 2^64.
        c0, c1, c2: int64 counters of one broadcastable shape, taken modulo 2^32.

    Returns:
        int64 words in `[0, 2^32)`, of the broadcast shape.
    """
    c0, c1, c2 = (c & _MASK for c in torch.broadcast_tensors(c0, c1, c2))
    c3 = torch.zeros_like(c0)
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_NUM_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIER_0)
        high1, low1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL_0) & _MASK, (key1 + _WEYL_1) & _MASK
    return c0


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 by 32 bit product; in 16-bit halves, since int64 has no room for the whole."""
    low_part = x * (constant & 0xFFFF)
    high_part = x * (constant >> 16)
    low_sum = low_part + ((high_part & 0xFFFF) << 16)
    high = (high_part >> 16) + (low_sum >> 32)
    return high & _MASK, low_sum & _MASK


def exponential(words: Tensor) -> Tensor:
    """Standard exponential draws from 32-bit words, in float32.

    e = -log(1 - w) with w = (word + 1/2) / 2^32. Below 1/64 a series keeps the small draws, which decide races between
    many tokens, exact to float32; a logarithm of 1 - w would round them to steps of 6e-8.
    """
    w = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp_max(1.0 - 2.0**-24)
    series = w * (1.0 + w * (0.5 + w * (1.0 / 3.0 + w * 0.25)))
    return torch.where(w < 1.0 / 64.0, series, -torch.log(1.0 - w))
