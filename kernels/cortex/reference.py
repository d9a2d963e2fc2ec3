"""Adaptive leaky integrate-and-fire neurons in hyper-columns, in plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cortex.spike import CEILINGS, spike
from kernels.precision import accumulation_dtype, no_autocast


class CortexState(NamedTuple):
    """What a column's neurons carry from one token to the next; each `[B, D]`, float32 (float64 in float64 models)."""

    voltage: Tensor
    adaptation: Tensor
    spikes: Tensor


class CortexOutput(NamedTuple):
    """Spikes `[B, T, D]`, the state after the last token, and two counts per neuron over lanes and tokens, `[D]` int32:
    how often it fired (spike > 0) and how often it was saturated (its spike's size at least its kind's ceiling)."""

    spikes: Tensor
    state: CortexState
    num_fired: Tensor
    num_saturated: Tensor


def cortex_reference(
    drive: Tensor,
    lateral_weight: Tensor,
    decay: Tensor,
    state: CortexState,
    document_start: Tensor | None = None,
    *,
    spike_kind: str = "graded",
    threshold: float = 0.5,
    adaptation_strength: float = 0.5,
    adaptation_decay: float = 0.95,
) -> CortexOutput:
    """Run D = K * C neurons through T tokens.

        p_t = I_t / sqrt(1 - alpha) + R s_{t-1}
        a_t = rho a_{t-1} + (1 - rho) s_{t-1}
        v_t = alpha (v_{t-1} - theta s_{t-1}) + (1 - alpha) p_t
        s_t = spike(v_t - theta - beta a_t)

    after Bellec et al. (2018), with a soft reset and the drive scaled so that slow neurons see unit variance. At a
    document's start v, a and s are zero.

    Arguments:
        drive: I, `[B, T, D]`.
        lateral_weight: R, `[K, C, C]`; `R[k, i, j]` is the weight from neuron j to neuron i of column k.
        decay: alpha, `[D]` in (0, 1).
        state: v, a and s before the first token.
        document_start: `[B, T]` bool, or None for no start inside the sequence.
        spike_kind: `graded`, `binary` or `smooth`, as for `spike`.
        threshold: theta.
        adaptation_strength: beta.
        adaptation_decay: rho, in [0, 1).

    Returns:
        CortexOutput; the spikes have the drive's type, the state accumulates in float32 or float64.
    """
    width = drive.shape[-1]
    num_columns, column_width, _ = lateral_weight.shape
    dtype = accumulation_dtype(drive, decay)

    def by_column(x: Tensor) -> Tensor:
        return x.to(dtype).reshape(*x.shape[:-1], num_columns, column_width).movedim(-2, -3)

    with no_autocast(drive):
        alpha = decay.to(dtype).view(num_columns, 1, column_width)
        recurrent = recurrent_weight(lateral_weight.to(dtype), alpha, threshold)
        # (1 - alpha) I / sqrt(1 - alpha), laid out [T, K, B, C] so that a token is one contiguous block.
        driven = by_column(drive.transpose(0, 1)) * (1 - alpha).sqrt()
        v, a, s = (by_column(x) for x in state)
        kept = None if document_start is None else (~document_start).to(dtype).t()[:, None, :, None]

        outputs = []
        # unbind, because the gradient of indexing by t would be a zero-filled copy of the whole sequence at each t.
        for t, driven_t in enumerate(driven.unbind(0)):
            if kept is not None:
                v, a, s = v * kept[t], a * kept[t], s * kept[t]
            a = torch.lerp(s, a, adaptation_decay)
            v = torch.baddbmm(torch.addcmul(driven_t, alpha, v), s, recurrent)
            s = spike(torch.sub(v, a, alpha=adaptation_strength) - threshold, spike_kind)
            outputs.append(s)

        def by_neuron(x: Tensor) -> Tensor:
            return x.movedim(-3, -2).reshape(*x.shape[:-3], x.shape[-2], width)

        spikes = torch.stack(outputs) if outputs else driven
        fired = spikes.detach() > 0
        saturated = spikes.detach().abs() >= CEILINGS[spike_kind]
        return CortexOutput(
            spikes=by_neuron(spikes).transpose(0, 1).to(drive.dtype),
            state=CortexState(by_neuron(v), by_neuron(a), by_neuron(s)),
            num_fired=fired.sum((0, 2), dtype=torch.int32).view(width),
            num_saturated=saturated.sum((0, 2), dtype=torch.int32).view(width),
        )


def recurrent_weight(lateral_weight: Tensor, alpha: Tensor, threshold: float) -> Tensor:
    """The one matrix a column, `[K, C, C]`, by which a row of spikes is multiplied: lateral input and soft reset,
    (1 - alpha) R s - alpha theta s, for R `[K, C, C]` and alpha `[K, 1, C]`."""
    return lateral_weight.transpose(1, 2) * (1 - alpha) - torch.diag_embed(alpha[:, 0] * threshold)
