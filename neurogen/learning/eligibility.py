"""Eligibility traces of the cortex's neurons, as pure functions.

A trace is the derivative of a neuron's own state by one of its parameters, carried forwards: voltage, adaptation and
spike, the tangent of `CortexState`. With psi_t the surrogate derivative at t and x_t what the parameter's change does
to v_t directly,

    eps^a_t = rho eps^a_{t-1} + (1 - rho) e_{t-1}
    eps^v_t = alpha eps^v_{t-1} + r e_{t-1} + x_t,      r = (1 - alpha) R_jj - alpha theta
    e_t     = psi_t (eps^v_t - beta eps^a_t)

after Bellec et al. (2020), for this neuron: e-prop with the soft reset, the adaptation and the neuron's synapse on
itself kept, and other neurons' spikes taken as given.

Shape letters: B lanes, D neurons, C neurons a column, K columns, F parameters a neuron.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cortex import CortexState


class Trace(NamedTuple):
    """Tangents of a neuron's state by each of its F parameters, `[B, D, F]` each; `spikes` is the eligibility."""

    voltage: Tensor
    adaptation: Tensor
    spikes: Tensor

    @classmethod
    def zeros(cls, lanes: int, neurons: int, parameters: int, like: Tensor) -> Trace:
        """No parameter has done anything yet."""
        return cls(*(like.new_zeros(lanes, neurons, parameters) for _ in range(3)))

    def reset(self, kept: Tensor) -> Trace:
        """The trace where `kept` `[B]` is one, nothing where it is zero: a document's start."""
        return Trace(*(part * kept.view(-1, 1, 1) for part in self))


def own_feedback(lateral_weight: Tensor, decay: Tensor, threshold: float) -> Tensor:
    """r `[D]`: what a neuron's spike does to its own voltage at the next token, for R `[K, C, C]` and alpha `[D]`."""
    return (1 - decay) * lateral_weight.diagonal(dim1=-2, dim2=-1).reshape(-1) - decay * threshold


def advance(
    trace: Trace,
    direct: Tensor,
    *,
    surrogate: Tensor,
    decay: Tensor,
    own: Tensor,
    adaptation_strength: float,
    adaptation_decay: float,
) -> Trace:
    """One token.

    Arguments:
        trace: before the token.
        direct: x, what each parameter does to the voltage at this token, broadcasting to `[B, D, F]`.
        surrogate: psi, `[B, D]`, the spike's derivative at this token.
        decay: alpha, `[D]`.
        own: r, `[D]`, see `own_feedback`.
        adaptation_strength, adaptation_decay: beta and rho.
    """
    adaptation = torch.lerp(trace.spikes, trace.adaptation, adaptation_decay)
    voltage = torch.addcmul(decay[:, None] * trace.voltage, own[:, None], trace.spikes) + direct
    spikes = surrogate[..., None] * torch.sub(voltage, adaptation, alpha=adaptation_strength)
    return Trace(voltage, adaptation, spikes)


def by_drive(presynaptic: Tensor, decay: Tensor) -> Tensor:
    """dv_t/dW for drive I = W h + b: sqrt(1 - alpha_j) h_i, `[B, D, F]` from h `[B, F]`."""
    return (1 - decay).sqrt()[:, None] * presynaptic[:, None, :]


def by_lateral(spikes_before: Tensor, decay: Tensor, column_width: int) -> Tensor:
    """dv_t/dR: (1 - alpha_i) s_{j,t-1} for the neurons j of i's column, `[B, D, C]` from s_{t-1} `[B, D]`."""
    columns = spikes_before.unflatten(-1, (-1, column_width))  # [B, K, C]
    return (1 - decay)[:, None] * columns.repeat_interleave(column_width, dim=1)


def by_decay_logit(
    drive: Tensor, before: CortexState, lateral_weight: Tensor, decay: Tensor, threshold: float
) -> Tensor:
    """dv_t/dlogit(alpha), `[B, D, 1]`: (v - theta s - I / (2 sqrt(1 - alpha)) - R s) alpha (1 - alpha), v and s those
    of the token before and I `[B, D]` this token's drive."""
    columns = before.spikes.unflatten(-1, (lateral_weight.shape[0], -1))
    lateral = torch.einsum("kij,bkj->bki", lateral_weight, columns).flatten(1)
    by_decay = before.voltage - threshold * before.spikes - drive / (2 * (1 - decay).sqrt()) - lateral
    return (by_decay * decay * (1 - decay))[..., None]


def credit(signal: Tensor, trace: Trace) -> Tensor:
    """sum over lanes of learning signal `[B, D]` times eligibility: this token's gradient, `[D, F]`."""
    return torch.einsum("bd,bdf->df", signal, trace.spikes)
