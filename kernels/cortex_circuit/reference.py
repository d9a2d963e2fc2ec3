"""A spiking layer's circuit in plain torch."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kernels.cortex import CortexState, cortex
from kernels.gated_norm import gated_norm
from kernels.linear import linear


class CortexCircuitOutput(NamedTuple):
    """What the circuit writes `[B, T, D]`, its state after the last token, and how often each neuron fired and was
    saturated (`[D]` int32)."""

    written: Tensor
    state: CortexState
    num_fired: Tensor
    num_saturated: Tensor


def cortex_circuit_reference(
    h: Tensor,
    in_projection: Tensor,
    drive_bias: Tensor,
    lateral: Tensor,
    decay: Tensor,
    out_projection: Tensor,
    state: CortexState,
    document_start: Tensor | None,
    go: Tensor | None,
    spike_kind: str,
    threshold: float,
    adaptation_strength: float,
    adaptation_decay: float,
    eps: float,
) -> CortexCircuitOutput:
    """[I, z] = W_in h + [b, 0];  s = spikes of the columns driven by I;  W_out (rms_per_column(s) * silu(z) * go).

    Arguments:
        h: the normalised workspace, `[B, T, D]`.
        in_projection, drive_bias, lateral, decay, out_projection: see `CortexWeights`.
        state: before the first token.
        document_start: `[B, T]` bool, or None.
        go: `[B, T, K]`, a factor on what each column writes, or None for 1.
        spike_kind, threshold, adaptation_strength, adaptation_decay: as for `kernels.cortex.cortex`.
        eps: added to mean squares.
    """
    bias = F.pad(drive_bias, (0, drive_bias.shape[0]))
    drive, gate = linear(h, in_projection, bias).chunk(2, dim=-1)
    out = cortex(
        drive,
        lateral,
        decay,
        state,
        document_start,
        spike_kind=spike_kind,
        threshold=threshold,
        adaptation_strength=adaptation_strength,
        adaptation_decay=adaptation_decay,
    )
    activity = gated_norm(out.spikes, gate, group_size=lateral.shape[-1], scale=go, eps=eps)
    return CortexCircuitOutput(linear(activity, out_projection), out.state, out.num_fired, out.num_saturated)
