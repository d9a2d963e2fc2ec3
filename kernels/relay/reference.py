"""Thalamic relay: embedding gather, RMS normalisation and a four-tap causal filter, in plain torch."""

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype, rms_normalize
from kernels.segments import segment_index

NO_TOKEN = -1


def relay_reference(
    input_ids: Tensor,
    embedding: Tensor,
    taps: Tensor,
    recent_ids: Tensor,
    document_start: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x_t = sum_j taps[j] * rms(E[id_{t-j}]), where a tap that would reach over a document's start reads zero.

    Arguments:
        input_ids: `[B, T]` int64 in `[0, V)`.
        embedding: `[V, D]`.
        taps: `[J, D]`, the gain of the token j places back, per channel.
        recent_ids: `[B, J-1]` int64, the ids before this sequence, oldest first; -1 where there is none.
        document_start: `[B, T]` bool, or None for no start inside the sequence.
        eps: added to the mean square.
        out_dtype: type of x; the embedding's if None.

    Returns:
        x `[B, T, D]`, and the `recent_ids` to carry into the next sequence.
    """
    num_taps = taps.shape[0]
    num_tokens = input_ids.shape[1]
    history = torch.cat([recent_ids, input_ids], dim=1)
    if document_start is None:
        document_start = torch.zeros_like(input_ids, dtype=torch.bool)
    segment = segment_index(torch.nn.functional.pad(document_start, (num_taps - 1, 0)))

    dtype = accumulation_dtype(embedding)
    normed = rms_normalize(embedding[history.clamp_min(0)].to(dtype), eps)
    normed = normed * (history != NO_TOKEN).unsqueeze(-1)
    now = slice(num_taps - 1, None)
    x = torch.zeros_like(normed[:, now])
    for j in range(num_taps):
        back = slice(num_taps - 1 - j, num_taps - 1 - j + num_tokens)
        same_document = (segment[:, now] == segment[:, back]).unsqueeze(-1)
        x = x + taps[j].to(dtype) * normed[:, back] * same_document

    last = slice(history.shape[1] - (num_taps - 1), None)
    carried = torch.where(segment[:, last] == segment[:, -1:], history[:, last], NO_TOKEN)
    return x.to(out_dtype or embedding.dtype), carried
