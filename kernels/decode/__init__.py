"""Decode: hidden states and targets to loss and accuracy."""

from torch import Tensor

from kernels.backend import check_backend
from kernels.decode.reference import IGNORE_INDEX, DecodeOutput, decode_reference
from kernels.linear import RoundedWeights

__all__ = ["IGNORE_INDEX", "DecodeOutput", "decode"]


def decode(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    rounded: RoundedWeights | None = None,
    backend: str = "reference",
) -> DecodeOutput:
    """Loss and accuracy of a linear decoder; see `decode_reference` for shapes and formula.

    `rounded` may keep the fused form's half-precision copy of the weight from one step to the next; the reference has
    no use for it.
    """
    check_backend(backend)
    if backend == "fused":
        from kernels.decode.fused import decode_fused

        return decode_fused(hidden, weight, target_ids, ignore_index=ignore_index, rounded=rounded)
    return decode_reference(hidden, weight, target_ids, ignore_index=ignore_index)
