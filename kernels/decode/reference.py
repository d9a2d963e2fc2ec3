"""Linear decoder, cross-entropy and arg-max hits, in plain torch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import linear
from kernels.precision import accumulation_dtype

IGNORE_INDEX = -100


class DecodeOutput(NamedTuple):
    """Mean cross-entropy in nats over the targets that count (0 if none does), how many of them the arg-max hits, and
    how many there are; all 0-dimensional, the counts int64."""

    loss: Tensor
    num_correct: Tensor
    num_targets: Tensor


def decode_reference(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> DecodeOutput:
    """Loss and accuracy of softmax(W h) against targets.

    Arguments:
        hidden: h, `[..., D]`.
        weight: W, `[V, D]`; one of another type than hidden, a float32 master for instance, is rounded to hidden's.
        target_ids: `[...]` int64 in `[0, V)` or `ignore_index`.
        ignore_index: targets with this value count neither in the loss nor in the accuracy.

    Returns:
        DecodeOutput. A tie of the largest logits goes to the lowest id.
    """
    hidden, target_ids = hidden.reshape(-1, hidden.shape[-1]), target_ids.reshape(-1)
    logits = linear(hidden, weight).to(accumulation_dtype(hidden))
    total = F.cross_entropy(logits, target_ids, ignore_index=ignore_index, reduction="sum")
    counted = target_ids != ignore_index
    num_targets = counted.sum()
    if logits.shape[0] == 0:
        return DecodeOutput(total, torch.zeros_like(num_targets), num_targets)
    num_correct = ((logits.detach().argmax(-1) == target_ids) & counted).sum()
    return DecodeOutput(total / num_targets.clamp_min(1), num_correct, num_targets)
