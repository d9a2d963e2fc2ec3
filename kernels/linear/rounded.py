"""Weights rounded to the type their products run in, made anew only when the weights have changed."""

from collections.abc import Sequence

import torch
from torch import Tensor


class RoundedWeights:
    """Keeps one rounded copy of some weights, their rows one above another, in a buffer that stays where it is.

    A change is seen by the weights' version counters, so whoever changes them behind autograd's back (a replayed CUDA
    graph) says so with `torch.autograd.graph.increment_version`. While a CUDA graph is recorded the rounding is always
    recorded with it.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._made_from: tuple[object, ...] | None = None

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
        recording = first.is_cuda and torch.cuda.is_current_stream_capturing()
        made_from = tuple((weight.data_ptr(), weight._version) for weight in weights)
        if recording or made_from != self._made_from:
            start = 0
            for weight in weights:
                buffer[start : start + weight.shape[0]].copy_(weight)
                start += weight.shape[0]
            self._made_from = None if recording else made_from
        return buffer
