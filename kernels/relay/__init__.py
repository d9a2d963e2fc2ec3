"""Relay: token ids to the first workspace vector."""

import torch
from torch import Tensor

from kernels.backend import check_backend
from kernels.relay.reference import NO_TOKEN, relay_reference

__all__ = ["NO_TOKEN", "relay"]


def relay(
    input_ids: Tensor,
    embedding: Tensor,
    taps: Tensor,
    recent_ids: Tensor,
    document_start: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Gather, normalise and filter a sequence of token ids; see `relay_reference` for shapes and formula."""
    check_backend(backend)
    if backend == "fused":
        from kernels.relay.fused import relay_fused

        return relay_fused(input_ids, embedding, taps, recent_ids, document_start, eps=eps, out_dtype=out_dtype)
    return relay_reference(input_ids, embedding, taps, recent_ids, document_start, eps=eps, out_dtype=out_dtype)
