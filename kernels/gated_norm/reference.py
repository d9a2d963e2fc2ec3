"""Per-group RMS normalisation times a SiLU gate: how every circuit hands its activity on, in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from kernels.precision import accumulation_dtype, rms_normalize


def gated_norm_reference(
    x: Tensor, gate: Tensor, *, group_size: int, scale: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """y = rms_per_group(x) * silu(gate) * scale.

    Arguments:
        x: `[..., D]`, normalised in groups of `group_size` neighbouring channels (a column, or a head).
        gate: `[..., D]`, before its activation.
        group_size: divides D.
        scale: `[..., D / group_size]`, one factor a group (the basal ganglia's Go gate), or None for 1.
        eps: added to the mean square.

    Returns:
        y `[..., D]` in x's type.
    """
    dtype = accumulation_dtype(x, gate)
    normed = rms_normalize(x.to(dtype).unflatten(-1, (-1, group_size)), eps)
    if scale is not None:
        normed = normed * scale.to(dtype).unsqueeze(-1)
    return (normed.flatten(-2) * F.silu(gate.to(dtype))).to(x.dtype)
