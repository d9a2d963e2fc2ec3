"""Dropout: while a model trains, some of what its parts write to the workspace is left out, and the rest scaled up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from neurogen.errors import UserError

MASKS = ("token", "sequence")


class Dropout(nn.Module):
    """Zeros with probability p, what is left over 1 - p (Srivastava et al. 2014), in training mode alone.

    Masks come from torch's default generator, which a recorded CUDA graph moves on at every replay and a checkpoint
    keeps.

    Arguments:
        p: in [0, 1); 0 hands every tensor on as it is.
        mask: `token` draws anew at every token, as a GPT does; `sequence` once for all tokens of a lane's sequence (Gal
            and Ghahramani 2016), so that what an earlier token wrote is read with the channels it was written with.
    """

    def __init__(self, p: float, mask: str = "token") -> None:
        super().__init__()
        self.p, self.mask = p, mask

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, D]` with some of its numbers left out."""
        if not self.training or self.p == 0:
            return x
        if self.mask == "token":
            return F.dropout(x, self.p)
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p)


def check_dropout(p: float) -> None:
    """Raise UserError unless p is a probability below 1."""
    if not 0 <= p < 1:
        raise UserError(f"model.dropout is {p}; it must be in [0, 1), 0 for none")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards each of its modules is in the mode it was in."""
    # As `module.training = ...`, whose checks take most of a millisecond for a brain's modules.
    trained = [vars(module) for module in model.modules() if module.training]
    for attributes in trained:
        attributes["training"] = False
    try:
        yield
    finally:
        for attributes in trained:
            attributes["training"] = True
