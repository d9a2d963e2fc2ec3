"""Which steps to skip and how far to scale the others' gradients down, in plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor

NUM_REMEMBERED = 128  # steps, as OLMo 2 takes for the same purpose (arXiv 2501.00656)
LEAST_FACTOR = 2.0  # of the mean: a long run of very equal steps would otherwise make outliers of harmless ones
CLIP_EPS = 1e-6  # as torch's own clipping has it


class History(NamedTuple):
    """What is remembered of steps.

    Arguments:
        values: `[2, N]` float64, losses and gradient norms of N steps, usually NUM_REMEMBERED; the last one last.
        num_steps: 0-d int64, steps remembered so far.
        streak: 0-d int64, steps skipped in a row up to the last one.
    """

    values: Tensor
    num_steps: Tensor
    streak: Tensor


def outlier_limits(history: History, sigma: float | None) -> Tensor:
    """`[2]`: the largest loss and gradient norm that the next step may have."""
    if sigma is None:
        return torch.full_like(history.values[:, 0], torch.inf)
    mean = history.values.mean(dim=1)
    limits = torch.maximum(mean + sigma * history.values.std(dim=1), LEAST_FACTOR * mean)
    return torch.where(history.num_steps >= history.values.shape[1], limits, torch.inf)


def verdict_reference(
    loss: Tensor, grad_norm: Tensor, history: History, *, sigma: float | None, max_norm: float
) -> tuple[Tensor, Tensor]:
    """1.0 if the step is to be skipped, else 0.0; and min(1, max_norm / grad_norm), what clipping multiplies gradients
    by; both 0-d. The history goes on, in place.

    A step is skipped if its loss or gradient norm is not finite, or is over its limit: sigma standard deviations above
    the mean of what is remembered and over LEAST_FACTOR times it, once enough is. Finite values are remembered, cut to
    the limit.

    Arguments:
        loss, grad_norm: 0-d.
        sigma: None for no limits, and nothing to remember.
    """
    values = torch.stack([loss.detach().double(), grad_norm.detach().double()])
    finite = torch.isfinite(values).all()
    skipped = ~finite
    if sigma is not None:
        limits = outlier_limits(history, sigma)
        skipped = skipped | (values > limits).any()
        extended = torch.cat([history.values[:, 1:], torch.minimum(values, limits)[:, None]], dim=1)
        history.values.copy_(torch.where(finite, extended, history.values))
        history.num_steps.add_(finite)
    history.streak.copy_(torch.where(skipped, history.streak + 1, torch.zeros_like(history.streak)))
    factor = (max_norm / (grad_norm.detach() + CLIP_EPS)).clamp_max(1.0)
    return skipped.to(torch.float32), factor
