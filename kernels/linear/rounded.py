"""Weights rounded to the type their products run in, made anew only when the weights have changed."""

from collections.abc import Sequence

import torch
from torch import Tensor


class RoundedWeights:
    """Keeps one rounded copy of some weights, their rows one above another, in a buffer that stays where it is.

    A change is seen by the weights' version counters, so whoever changes them behind autograd's back (a replayed CUDA
    graph) says so with `torch.autograd.graph.increment_version`. While a CUDA graph is recorded the rounding is
    recorded with it, unless an optimiser that writes the copy itself is part of it.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._made_from: tuple[object, ...] | None = None
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._is_followed = False

    @torch.no_grad()
    def get(self, weights: Sequence[Tensor], dtype: torch.dtype, *, rows_multiple: int = 1) -> Tensor:
        """The weights, `[rows_i, D]` each, as one `[rows, D]` of `dtype`, with rows of zeros up to a multiple.

        A single weight that is in `dtype` already, and needs no more rows, is returned itself.
        """
        num_rows = sum(weight.shape[0] for weight in weights)
        padded = -(-num_rows // rows_multiple) * rows_multiple
        first = weights[0]
        if len(weights) == 1 and padded == num_rows and first.dtype == dtype:
            return first.detach()
        shape = (padded, *first.shape[1:])
        buffer = self._buffer
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype or buffer.device != first.device:
            buffer = self._buffer = torch.zeros(shape, dtype=dtype, device=first.device)
            self._made_from = None
        made_from = _identity(weights)
        recording = first.is_cuda and torch.cuda.is_current_stream_capturing() and not self._is_followed
        if recording or made_from != self._made_from:
            rows = buffer[:num_rows].split([weight.shape[0] for weight in weights])
            self._parts = list(zip(weights, rows))
            for weight, part in self._parts:
                part.copy_(weight)
            self._made_from = None if recording else made_from
        return buffer

    @property
    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Each weight of the last call, and its rows of the buffer."""
        return self._parts

    def follow(self) -> None:
        """Somebody who changed the weights has written their new values into `parts` as well, and will do so again
        whenever they change, in a recorded graph too."""
        self._is_followed = True
        self._made_from = _identity([weight for weight, _ in self._parts])


def _identity(weights: Sequence[Tensor]) -> tuple[object, ...]:
    return tuple((weight.data_ptr(), weight._version) for weight in weights)
