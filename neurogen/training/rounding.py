"""What a model would lose if its matrices were stored in 8 bits: each weight rounded, row by row, where it stands."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.generate.quantized import LARGEST_INT8, quantize_rows, row_scale

LARGEST = {"int8": LARGEST_INT8, "fp8": 448.0}  # fp8 is e4m3, which has no infinity


def round_rows(weight: Tensor, kind: str) -> Tensor:
    """A matrix `[rows, columns]` as 8 bits a weight and one float32 factor a row would give it back, in float32.

    int8 divides a row into 255 even steps between plus and minus its largest weight; fp8 keeps three bits of each
    weight's mantissa. A launch multiplies by the factor after summing a row's products, so only the 8 bits round;
    a model in bfloat16 rounds once more, as it does any weight.
    """
    if kind == "int8":
        rounded, scale = quantize_rows(weight)
        return rounded.float() * scale[:, None]
    weight = weight.float()
    factor = row_scale(weight, LARGEST[kind])
    return (weight / factor).to(torch.float8_e4m3fn).float() * factor


@torch.no_grad()
def round_weights(model: nn.Module, kind: str) -> int:
    """Round a model's projections and its decoder in place; a tied embedding goes with the decoder. Returns how many
    weights that were."""
    done: set[int] = set()
    count = 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(("_proj.weight", "decoder.weight")) and parameter.ndim == 2 and id(parameter) not in done:
            done.add(id(parameter))
            parameter.copy_(round_rows(parameter, kind))
            count += parameter.numel()
    return count
