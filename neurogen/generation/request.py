"""What generation is asked for and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.sample import Sampling
from neurogen.brain import BrainState
from neurogen.errors import UserError


@dataclass(frozen=True)
class Request:
    """Prompts to continue, checked and on the model's device.

    Arguments:
        input_ids: `[B, T]` int64, T >= 1.
        max_new_tokens: N >= 1.
        sampling: how tokens are drawn.
        seed: of the draws.
        stop: ids that end a lane.
        state: of B lanes, before the prompt.
        lanes: `[B]` int64, the number each lane has in its draws; 0 to B - 1 if None.
        seen: `[B, V]` bool, tokens read before the prompt that a repetition penalty counts too.
        weights: what the matrices are rounded to while tokens are drawn, see `neurogen.generation.fit`.
    """

    input_ids: Tensor
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[int, ...]
    state: BrainState
    lanes: Tensor | None = None
    seen: Tensor | None = None
    weights: str | None = None

    def lane_numbers(self) -> Tensor:
        """`[B]` int64."""
        if self.lanes is not None:
            return self.lanes
        return torch.arange(self.input_ids.shape[0], device=self.input_ids.device)

    def seen_tokens(self, vocab_size: int) -> Tensor | None:
        """`[B, V]` bool, tokens of the prompt and before; None without a repetition penalty. A new tensor."""
        if self.sampling.repetition_penalty == 1:
            return None
        if self.seen is not None:
            seen = self.seen.clone()
        else:
            shape = (self.input_ids.shape[0], vocab_size)
            seen = torch.zeros(shape, dtype=torch.bool, device=self.input_ids.device)
        return seen.scatter_(1, self.input_ids, True)


@dataclass(frozen=True)
class Generation:
    """Tokens that follow the prompts, on the device.

    Arguments:
        tokens: `[B, N]` int64, N the number asked for; after a lane's stop token its row is filled with that token.
        log_probs: `[B, N]` float32, under the model's own softmax; 0 in the filling.
        lengths: `[B]` int64, tokens of each lane up to and including its stop token.
        state: each lane's after the last token it read; the lane's last token was drawn and not read.

    A reply goes on from where it ended by giving back what is missing: `model.generate(reply.last_tokens(),
    state=reply.state, seed=seed)` draws what a longer call would have drawn (a repetition penalty needs `seen` too).
    """

    tokens: Tensor
    log_probs: Tensor
    lengths: Tensor
    state: BrainState

    def last_tokens(self) -> Tensor:
        """`[B, 1]` int64, the token of each lane that was drawn and not read. A call gives one at least."""
        return self.tokens[:, -1:]

    def replies(self) -> list[list[int]]:
        """Each lane's ids without the filling, in one copy to the host."""
        rows = torch.cat([self.lengths[:, None], self.tokens], dim=1).tolist()
        return [row[1 : 1 + row[0]] for row in rows]


def check_prompt(input_ids: Tensor, vocab_size: int, max_new_tokens: int) -> None:
    """Raise UserError unless the prompt is `[B, T]` with T >= 1 and ids in the vocabulary, and there is work to do.

    Reads the ids on the host: for a prompt that is still there, this waits for nothing.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise UserError(
            f"the prompt has shape {tuple(input_ids.shape)}; it must be [lanes, tokens] with at least one token "
            "(a document-start id begins a text from nothing)"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    ids = input_ids.numpy(force=True)
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"the prompt has type {input_ids.dtype}; token ids are integers")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(f"the prompt has token id {low if low < 0 else high}; the vocabulary is 0..{vocab_size - 1}")


def check_stop(stop: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The stop ids as a tuple. Raises UserError for one outside the vocabulary, which could never be drawn."""
    for token_id in stop:
        if not 0 <= token_id < vocab_size:
            raise UserError(f"stop has token id {token_id}; the vocabulary is 0..{vocab_size - 1}")
    return tuple(int(token_id) for token_id in stop)


def make_sampling(*, temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float) -> Sampling:
    """The settings of a draw; UserError for one out of range."""
    try:
        return Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    except ValueError as error:
        raise UserError(str(error)) from error
