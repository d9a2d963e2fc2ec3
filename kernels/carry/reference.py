"""A state's tensors carried on, in plain torch."""

from collections.abc import Sequence

from torch import Tensor


def carry_reference(kept: Sequence[Tensor], own: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """kept = own; own = new with zeros for what is not finite; in place, and tensor by tensor."""
    for before, x, after in zip(kept, own, new, strict=True):
        before.copy_(x)
        x.copy_(after.nan_to_num(0.0, 0.0, 0.0) if after.is_floating_point() else after)
