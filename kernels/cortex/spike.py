"""Spike functions and the derivative that training uses in place of theirs.

The third, `smooth`, is no spike: a unit with a derivative of its own and nothing in the place of it, for spikes to be
held against.
"""

import math
from typing import Any

import torch
from torch import Tensor

GRADED_CEILING = 4.0
SMOOTH_CEILING = 0.99  # tanh never reaches 1; here a fiftieth of its slope is left
SMOOTH_LIMIT = math.atanh(SMOOTH_CEILING)  # the u that reaches it
# What a spike's size must reach for a neuron to count as saturated.
CEILINGS = {"graded": GRADED_CEILING, "binary": 1.0, "smooth": SMOOTH_CEILING}
SPIKES = tuple(CEILINGS)


class _GradedSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return u.clamp(0.0, GRADED_CEILING)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grad * graded_derivative(u)


class _BinarySpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grad * binary_derivative(u)


def graded_derivative(u: Tensor) -> Tensor:
    """1 inside (0, 4); outside, 0.2 / (1 + 9 u^2), so that silent and saturated neurons still learn."""
    inside = (u > 0) & (u < GRADED_CEILING)
    return torch.where(inside, torch.ones_like(u), 0.2 / (1.0 + 9.0 * u.square()))


def binary_derivative(u: Tensor) -> Tensor:
    """1 / (1 + (pi u)^2), the arctangent surrogate of Fang et al. (2021) at width 2."""
    return 1.0 / (1.0 + (math.pi * u).square())


def smooth_derivative(u: Tensor) -> Tensor:
    """1 - tanh(u)^2, tanh's own."""
    return 1.0 - torch.tanh(u).square()


def derivative(u: Tensor, kind: str) -> Tensor:
    """What backward multiplies by, for spikes of `kind` at u."""
    if kind == "smooth":
        return smooth_derivative(u)
    return graded_derivative(u) if kind == "graded" else binary_derivative(u)


def spike(u: Tensor, kind: str) -> Tensor:
    """Spikes of neurons whose membrane voltage exceeds their threshold by u.

    Arguments:
        u: any shape.
        kind: `graded` gives min(relu(u), 4), `binary` gives 1 where u > 0, `smooth` gives tanh(u).

    Returns:
        Spikes shaped like u. Backward uses `derivative`.
    """
    if kind not in SPIKES:
        raise ValueError(f"spike is {kind!r}; choose one of {', '.join(SPIKES)}")
    if kind == "smooth":
        return torch.tanh(u)
    return _GradedSpike.apply(u) if kind == "graded" else _BinarySpike.apply(u)
