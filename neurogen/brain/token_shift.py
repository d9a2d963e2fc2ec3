"""Token shift: each channel of a sequence mixed with its own last values before a projection reads it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.precision import accumulation_dtype, no_autocast


class TokenShift(nn.Module):
    """k causal taps a channel, after RWKV's token shift (Peng et al. 2023) and Mamba's short convolution (Gu and Dao
    2023). Starts as the identity.

    Arguments:
        width: D.
        num_taps: k, at least 2.
    """

    def __init__(self, width: int, num_taps: int) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(num_taps, width))
        with torch.no_grad():
            self.taps[0] = 1.0

    def init_recent(self, lanes: int) -> Tensor:
        """What new lanes carry: no rows, which are zeros `[B, k-1, D]`."""
        num_taps, width = self.taps.shape
        dtype = torch.promote_types(self.taps.dtype, torch.float32)
        return torch.zeros(lanes, num_taps - 1, width, dtype=dtype, device=self.taps.device)

    def forward(self, h: Tensor, recent: Tensor, document_start: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `token_shift`."""
        with no_autocast(h):
            return token_shift(h, self.taps, recent, document_start)


def token_shift(h: Tensor, taps: Tensor, recent: Tensor, document_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_t = sum_{j<k} w_j * h_{t-j}, over the tokens of t's own document.

    Arguments:
        h: `[B, T, D]`.
        taps: w, `[k, D]`.
        recent: the k-1 rows before the first token, oldest first, `[B, k-1, D]`; zeros where there was none.
        document_start: `[B, T]` bool, or None for no start inside the sequence.

    Returns:
        y `[B, T, D]` in h's type, and the rows to carry on, in the type of `recent`. Sums are in float32 (float64 for
        float64).
    """
    num_tokens, num_recent = h.shape[1], recent.shape[1]
    if num_tokens == 0:
        return h, recent
    dtype = accumulation_dtype(h, taps)
    rows = torch.cat([recent.to(dtype), h.to(dtype)], dim=1)
    taps = taps.to(dtype)
    age = None if document_start is None else _tokens_since_start(document_start, num_recent)
    y = taps[0] * rows[:, num_recent:]
    for lag in range(1, num_recent + 1):
        earlier = rows[:, num_recent - lag : num_recent - lag + num_tokens]
        if age is not None:
            earlier = earlier * (age >= lag).to(dtype)[..., None]
        y = torch.addcmul(y, taps[lag], earlier)
    carried = rows[:, num_tokens:]
    if age is not None:
        back = torch.arange(num_recent - 1, -1, -1, device=h.device)  # how far each row lies before the last token
        carried = carried * (age[:, -1:] >= back).to(dtype)[..., None]
    return y.to(h.dtype), carried.to(recent.dtype)


def _tokens_since_start(document_start: Tensor, most: int) -> Tensor:
    """How many tokens of its document each token has before it, `[B, T]`, counted from the last start in the sequence;
    at least `most` where there is none, for there the rows carried in are the document's own."""
    at = torch.arange(document_start.shape[1], device=document_start.device)
    return at - torch.where(document_start, at, -most).cummax(dim=1).values
