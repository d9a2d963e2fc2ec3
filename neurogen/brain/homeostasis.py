"""Homeostatic plasticity: a neuron that fires too often becomes less excitable, one that is silent more so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.activity import homeostatic_pull


def add_homeostasis(
    loss: Tensor,
    biases: Sequence[Tensor],
    num_fired: Tensor,
    num_tokens: int,
    num_targets: Tensor,
    *,
    strength: float,
    target: float,
    backend: str = "reference",
) -> Tensor:
    """The loss, unchanged as a number, whose gradient at each layer's bias has the layer's pull added: it is scaled,
    averaged over parts and processes, clipped and applied with it.

    The pull on neuron j is strength sum_t (s_jt > 0 - target) / num_targets, the sum over the sequence's lane-tokens.
    Where each has a target to predict it is strength (rate_j - target). It is divided as the mean loss is, so that the
    parts of a batch weighted by their targets add up to the whole, less parts without a target, from which nothing is
    learnt. Descent along the pull lowers the bias of neurons above the target and raises it below, silent ones
    included, which no gradient of the loss may reach.

    Arguments:
        biases: each cortex layer's drive bias, `[D]`, L of them.
        num_fired: in this sequence, `[L, D]` int32.
        num_tokens: of all lanes.
        num_targets: 0-dimensional int64, on the device.
        backend: which kernels run, `reference` or `fused`.
    """
    if backend == "fused":
        from kernels.activity.fused import pulled_loss

        return pulled_loss(loss, biases, num_fired, num_tokens, num_targets, strength=strength, target=target)
    pulls = homeostatic_pull(num_fired, num_tokens, num_targets, strength=strength, target=target)
    terms = [(pull.to(bias.dtype) * (bias - bias.detach())).sum() for pull, bias in zip(pulls.unbind(), biases)]
    return loss + torch.stack(terms).sum().to(loss.dtype)
