"""Matrices in 8 bits: a row's weights as int8, and one float32 scale that gives them back."""

import torch
from torch import Tensor

from kernels.generate.layout import PackedBrain
from kernels.generate.matrix_order import matrices_in_order

LARGEST_INT8 = 127.0


def row_scale(weight: Tensor, largest: float) -> Tensor:
    """`[rows, 1]` float32: what each row of a float32 matrix `[rows, columns]` is divided by so that its largest weight
    becomes plus or minus `largest`; 1 for a row of zeros."""
    most = weight.abs().amax(1, keepdim=True)
    return torch.where(most > 0, most / largest, 1.0)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix `[rows, columns]` as int8 from -127 to 127, and the scale of each row, `[rows]` float32; 0 for a row of
    zeros, whose sum is then 0 exactly however products are rounded."""
    weight = weight.float()
    scale = row_scale(weight, LARGEST_INT8)
    rounded = (weight / scale).round().to(torch.int8)
    return rounded, torch.where((rounded != 0).any(1), scale[:, 0], 0.0)


def dequantized(brain: PackedBrain) -> PackedBrain:
    """A brain with the same weights in float32 in place of int8 and scales; one without scales as it is."""
    if brain.scales is None:
        return brain
    flat, scales = brain.matrices, brain.scales
    matrices = [scales.new_zeros(0)]
    for _, _, _, num_rows, width_in, halves in matrices_in_order(brain.shape)[:-1]:  # the decoder is the last
        rows = num_rows * halves
        matrices.append((flat[: rows * width_in].view(rows, width_in) * scales[:rows, None]).flatten())
        flat, scales = flat[rows * width_in :], scales[rows:]
    return brain._replace(decoder=brain.decoder * scales[:, None], matrices=torch.cat(matrices), scales=None)
