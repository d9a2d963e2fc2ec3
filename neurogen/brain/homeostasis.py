"""Homeostatic plasticity: a neuron that fires too often becomes less excitable, one that is silent more so."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from neurogen.brain.regions import Activity


def homeostatic_pull(activity: Activity, *, strength: float, target: float) -> Tensor:
    """strength (rate_j - target), `[D]` float64: what is added to the gradient of each neuron's drive bias.

    rate_j is the share of the sequence's lane-tokens at which neuron j fired; descent along the pull lowers the bias of
    neurons above the target and raises it below, silent ones included, which no gradient of the loss may reach.
    """
    rate = activity.num_fired.double() / max(activity.num_tokens, 1)
    return strength * (rate - target)


def homeostatic_loss(
    activity: Mapping[str, Activity], biases: Mapping[str, Tensor], *, strength: float, target: float
) -> Tensor:
    """A number that is zero and whose gradient at each layer's bias is the layer's pull, so that it is scaled, averaged
    over parts and processes, clipped and applied as the loss's own gradient is.

    Arguments:
        activity: of each cortex layer in this sequence, with at least one layer.
        biases: each layer's drive bias, `[D]`.
    """
    terms = []
    for name, layer in activity.items():
        bias = biases[name]
        pull = homeostatic_pull(layer, strength=strength, target=target).to(bias.dtype)
        terms.append((pull * (bias - bias.detach())).sum())
    return torch.stack(terms).sum()
