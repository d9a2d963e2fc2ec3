"""Arithmetic types: the references compute in float32, or in float64 when given float64."""

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, otherwise float32: half-precision storage never means half-precision sums."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which torch.autocast leaves matrix products in the type they are given."""
    return torch.autocast(tensor.device.type, enabled=False)


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, without a learned gain (Zhang and Sennrich 2019)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def full_precision_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A small projection kept out of autocast, for quantities whose rounding would be felt over thousands of tokens."""
    with no_autocast(x):
        return F.linear(x.to(weight.dtype), weight, bias)
