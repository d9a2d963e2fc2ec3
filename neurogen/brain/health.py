"""Neural health: what the neurons and gates did during a sequence, as a few numbers a region."""

from collections import defaultdict

import torch
from torch import Tensor

from neurogen.brain.brain import BrainOutput

SATURATED_SHARE = 0.5  # of a neuron's tokens


def health_metrics(out: BrainOutput) -> dict[str, Tensor]:
    """Zero-dimensional tensors, left on the device.

    Returns, for each cortex region:
        `<region>/firing_rate`: share of neurons and tokens with a spike, in [0, 1].
        `<region>/silent`: share of neurons that never fired.
        `<region>/saturated`: share of neurons at their ceiling in at least half of their tokens.
    and `go_rate`: mean of the basal ganglia's gates, in [0, 1].
    """
    by_region: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
    for name, activity in out.activity.items():
        fired = activity.num_fired.float() / max(activity.num_tokens, 1)
        saturated = activity.num_saturated.float() / max(activity.num_tokens, 1)
        by_region[name.split(".")[0]].append(
            {
                "firing_rate": fired.mean(),
                "silent": (fired == 0).float().mean(),
                "saturated": (saturated >= SATURATED_SHARE).float().mean(),
            }
        )
    metrics = {
        f"{region}/{key}": torch.stack([layer[key] for layer in layers]).mean()
        for region, layers in by_region.items()
        for key in layers[0]
    }
    if out.go is not None and out.go.numel():
        metrics["go_rate"] = out.go.detach().float().mean()
    return metrics
