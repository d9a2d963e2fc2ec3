"""The path of the workspace through its own main directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """A path in the plane that shows most of it.

    Arguments:
        path: `[T, 2]`, coordinates along the first two principal components; the mean is at the origin.
        explained: share of the variance that lies in the plane, in [0, 1]; 1 for a path that stands still.
    """

    path: Tensor
    explained: float


def principal_trajectory(x: Tensor) -> Trajectory:
    """Vectors `[T, D]`, T and D >= 1, projected onto their first two principal components.

    A component's sign is chosen so that its largest coordinate along the path is positive: the same path is always
    drawn the same way.
    """
    centred = x.double() - x.double().mean(0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    path = left[:, :2] * sizes[:2]
    if path.shape[1] < 2:
        path = torch.nn.functional.pad(path, (0, 2 - path.shape[1]))
    largest = path.gather(0, path.abs().argmax(0, keepdim=True))
    path = torch.where(largest < 0, -path, path)
    variance = sizes.square()
    total = float(variance.sum())
    return Trajectory(path, float(variance[:2].sum()) / total if total > 0 else 1.0)
