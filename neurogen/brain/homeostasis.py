"""Homeostatic plasticity: a neuron that fires too often becomes less excitable, one that is silent more so."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from neurogen.brain.regions import Activity


def homeostatic_pull(activity: Activity, num_targets: Tensor, *, strength: float, target: float) -> Tensor:
    """strength sum_t (s_jt > 0 - target) / num_targets, `[D]` float64: what is added to the gradient of each neuron's
    drive bias.

    The sum is over the sequence's lane-tokens. Where each has a target to predict it is strength (rate_j - target). It
    is divided as the mean loss is, so that the parts of a batch weighted by their targets add up to the whole, less
    parts without a target, from which nothing is learnt. Descent along the pull lowers the bias of neurons above the
    target and raises it below, silent ones included, which no gradient of the loss may reach.

    Arguments:
        num_targets: 0-dimensional, on the device.
    """
    excess = activity.num_fired.double() - target * activity.num_tokens
    return strength * excess / num_targets.clamp_min(1)


def homeostatic_loss(
    activity: Mapping[str, Activity],
    biases: Mapping[str, Tensor],
    num_targets: Tensor,
    *,
    strength: float,
    target: float,
) -> Tensor:
    """A number that is zero and whose gradient at each layer's bias is the layer's pull, so that it is scaled, averaged
    over parts and processes, clipped and applied as the loss's own gradient is.

    Arguments:
        activity: of each cortex layer in this sequence, with at least one layer.
        biases: each layer's drive bias, `[D]`.
        num_targets: 0-dimensional, on the device.
    """
    terms = []
    for name, layer in activity.items():
        bias = biases[name]
        pull = homeostatic_pull(layer, num_targets, strength=strength, target=target).to(bias.dtype)
        terms.append((pull * (bias - bias.detach())).sum())
    return torch.stack(terms).sum()
