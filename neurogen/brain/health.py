"""Neural health: what the neurons and gates did during a sequence, as a few numbers a region."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.activity import SATURATED_SHARE, activity_shares_reference
from neurogen.brain.brain import BrainOutput
from neurogen.brain.regions import Activity

__all__ = ["SATURATED_SHARE", "health_metrics", "stack_activity"]

SHARES = ("firing_rate", "silent", "saturated")  # as kernels.activity orders them


def stack_activity(activity: Mapping[str, Activity]) -> tuple[Tensor, Tensor]:
    """num_fired and num_saturated of all layers, `[L, D]` int32 each, with at least one layer."""
    layers = activity.values()
    counts = [layer.num_fired for layer in layers] + [layer.num_saturated for layer in layers]
    fired, saturated = torch.stack(counts).chunk(2)
    return fired, saturated


def health_metrics(
    out: BrainOutput, counts: tuple[Tensor, Tensor] | None = None, *, backend: str = "reference"
) -> dict[str, Tensor]:
    """Zero-dimensional tensors, left on the device.

    Arguments:
        counts: `stack_activity(out.activity)`, where the caller has it.
        backend: which kernels run, `reference` or `fused`.

    Returns, for each cortex region:
        `<region>/firing_rate`: share of neurons and tokens with a spike, in [0, 1].
        `<region>/silent`: share of neurons that never fired.
        `<region>/saturated`: share of neurons at their ceiling in at least half of their tokens.
    and `go_rate`: mean of the basal ganglia's gates, in [0, 1].
    """
    metrics: dict[str, Tensor] = {}
    if out.activity:
        num_fired, num_saturated = counts or stack_activity(out.activity)
        num_tokens = next(iter(out.activity.values())).num_tokens
        if backend == "fused":
            from kernels.activity.fused import activity_shares_fused

            shares = activity_shares_fused(num_fired, num_saturated, num_tokens)
        else:
            shares = activity_shares_reference(num_fired, num_saturated, num_tokens)
        regions = [name.split(".")[0] for name in out.activity]
        for region in dict.fromkeys(regions):
            first, number = regions.index(region), regions.count(region)
            mean = shares[first] if number == 1 else shares[first : first + number].mean(0)
            metrics |= {f"{region}/{share}": value for share, value in zip(SHARES, mean.unbind())}
    if out.go is not None and out.go.numel():
        metrics["go_rate"] = out.go.detach().float().mean()
    return metrics
