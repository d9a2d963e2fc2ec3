"""How far a rule's gradient points the way back-propagation through time does."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from neurogen.brain import BrainState
from neurogen.data import Batch
from neurogen.learning.rule import BPTT, LearningRule
from neurogen.model import NeuroGen

# Parameters by what they are to the local rule: the first four learn from traces, the others at once.
GROUPS = ("drive", "drive_bias", "lateral_weight", "decay_logit", "cortex, rest", "memory", "relay", "go", "decoder")


def window_gradients(
    rule: LearningRule, model: NeuroGen, batch: Batch, state: BrainState | None = None
) -> dict[str, Tensor]:
    """The gradient of a window's mean loss by parameter, zeros where the rule gives none; `.grad` is left empty."""
    model.zero_grad(set_to_none=True)
    rule.learn(model, batch, state, share=1.0, autocast=nullcontext)
    gradients = {
        name: torch.zeros_like(param) if param.grad is None else param.grad.clone()
        for name, param in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return gradients


def by_group(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """One flat vector for each of GROUPS the model has."""
    parts: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for name, gradient in gradients.items():
        words = name.split(".")
        if words[0] == "decoder":
            parts["decoder"].append(gradient)
        elif words[0] == "embedding" or "thalamus" in words:
            parts["relay"].append(gradient)
        elif "basal_ganglia" in words:
            parts["go"].append(gradient)
        elif words[1] in ("hippocampus", "pfc"):
            parts["memory"].append(gradient)
        elif words[-1] in GROUPS:
            parts[words[-1]].append(gradient)
        elif words[-2:] == ["in_proj", "weight"] and "mlp" not in words:
            drive, gate = gradient.chunk(2)
            parts["drive"].append(drive)
            parts["cortex, rest"].append(gate)
        else:
            parts["cortex, rest"].append(gradient)
    return {group: torch.cat([part.flatten() for part in found]) for group, found in parts.items() if found}


def cosines(rule: LearningRule, model: NeuroGen, batch: Batch, state: BrainState | None = None) -> dict[str, float]:
    """Cosine between the rule's gradient and BPTT's, by group and for `all` together; nan where one is zero."""
    ours = by_group(window_gradients(rule, model, batch, state))
    exact = by_group(window_gradients(BPTT(), model, batch, state))
    ours["all"], exact["all"] = torch.cat(list(ours.values())), torch.cat(list(exact.values()))
    return {
        group: float(vector @ exact[group] / (vector.norm() * exact[group].norm())) for group, vector in ours.items()
    }
