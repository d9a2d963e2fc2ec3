"""Shares of active neurons, and the pull of homeostasis, in plain torch. L layers of D neurons each."""

import torch
from torch import Tensor

SATURATED_SHARE = 0.5  # of a neuron's tokens


def activity_shares_reference(num_fired: Tensor, num_saturated: Tensor, num_tokens: int) -> Tensor:
    """`[L, 3]`: the share of neurons and tokens with a spike; of neurons that never fired; and of neurons at their
    ceiling in at least half of their tokens.

    Arguments:
        num_fired, num_saturated: `[L, D]` int32, tokens of each neuron.
        num_tokens: of all lanes.
    """
    fired = num_fired.float() / max(num_tokens, 1)
    saturated = num_saturated.float() / max(num_tokens, 1)
    silent, full = (fired == 0).float(), (saturated >= SATURATED_SHARE).float()
    return torch.stack([fired.mean(-1), silent.mean(-1), full.mean(-1)], dim=-1)


def homeostatic_pull(
    num_fired: Tensor, num_tokens: int, num_targets: Tensor, *, strength: float, target: float
) -> Tensor:
    """strength (num_fired - target num_tokens) / num_targets in float64, of num_fired's shape.

    Arguments:
        num_targets: 0-dimensional, on the device; 0 counts as 1.
    """
    excess = num_fired.double() - target * num_tokens
    return strength * excess / num_targets.clamp_min(1)
