"""Whether text arrives as fast as the model reads it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from neurogen.model import NeuroGen

MEASURE_SECONDS = 1.0
TEXT_BYTES = 1 << 20


class Encoder(Protocol):
    """The part of `neurogen.data.Tokenizer` that is measured."""

    def encode(self, text: bytes) -> Any: ...


class TokenBatch(Protocol):
    """The part of `neurogen.data.Batch` that is measured."""

    input_ids: Tensor
    target_ids: Tensor


def measure_tokenization(
    model: NeuroGen,
    tokenizer: Encoder,
    text: bytes,
    batches: Iterator[TokenBatch],
    *,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """Tokens a second: of the tokenizer, of the data pipeline, and of training in the model's mode.

    Arguments:
        model: on its device; trained a few steps.
        tokenizer: encodes `text` again and again for about a second.
        text: at least a byte.
        batches: an endless iterator whose ids fit the model.
        autocast: makes the context of a training step, a new one for each.

    Returns:
        `tokenizer`, `pipeline`, `model` in tokens a second, and `pipeline_share`: the time to serve a batch over the
        time to train on it.
    """
    encoded = _rate(lambda: len(tokenizer.encode(text[:TEXT_BYTES])))
    served = _rate(lambda: next(batches).input_ids.numel())

    def train() -> int:
        batch = next(batches)
        with autocast():
            model.train_step(batch.input_ids.to(model.device), batch.target_ids.to(model.device))
        return batch.input_ids.numel()

    train()
    consumed = _rate(train)
    return {"tokenizer": encoded, "pipeline": served, "model": consumed, "pipeline_share": consumed / served}


def _rate(work: Any) -> float:
    """Tokens a second of a function that returns how many tokens it handled."""
    num_tokens, start = 0, time.perf_counter()
    while True:
        num_tokens += work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if seconds >= MEASURE_SECONDS:
            return num_tokens / seconds
