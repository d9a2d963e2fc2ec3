"""SwiGLU's activation (Shazeer 2020), in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from kernels.precision import accumulation_dtype


def swiglu_reference(gate_and_value: Tensor) -> Tensor:
    """silu(gate) * value.

    Arguments:
        gate_and_value: `[..., 2F]`, gate then value, as one projection makes them.

    Returns:
        `[..., F]` in the input's type.
    """
    gate, value = gate_and_value.to(accumulation_dtype(gate_and_value)).chunk(2, dim=-1)
    return (F.silu(gate) * value).to(gate_and_value.dtype)
