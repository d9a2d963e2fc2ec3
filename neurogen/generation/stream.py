"""Replies in pieces: tokens reach the host while the rest is still to come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.sample import Sampling
from neurogen.brain import BrainState
from neurogen.errors import UserError
from neurogen.generation.fit import check_weights
from neurogen.generation.prompts import Prompts, check_prompts, generate_prompts
from neurogen.generation.request import Generation

if TYPE_CHECKING:
    from neurogen.model import NeuroGen


def generate_stream(
    model: NeuroGen,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    chunk_tokens: int = 16,
    sampling: Sampling,
    seed: int = 0,
    stop: Sequence[int] = (),
    state: BrainState | None = None,
    weights: str | None = None,
) -> Iterator[Generation]:
    """Continue prompts, yielding `chunk_tokens` tokens a lane at a time; their concatenation is what `generate_prompts`
    gives at once, filling aside.

    A piece's `lengths` count its own tokens: 0 for a lane that had ended before. Its `state` is that of all lanes after
    it, so the caller may stop at any piece and go on from there another time.

    Arguments:
        chunk_tokens: tokens a launch makes before the host sees them, at least 1. Each piece costs a launch, a copy of
            the state and one synchronisation.
        others: as for `generate_prompts`.

    Raises:
        UserError: as for `generate_prompts`, and at once, not at the first piece.
    """
    if chunk_tokens < 1:
        raise UserError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    rows = check_prompts(prompts, model.vocab_size, max_new_tokens)
    check_weights(model, weights, len(rows))
    return _stream(model, rows, max_new_tokens, chunk_tokens, sampling, seed, stop, state, weights)


def _stream(
    model: NeuroGen,
    rows: list[Tensor],
    max_new_tokens: int,
    chunk_tokens: int,
    sampling: Sampling,
    seed: int,
    stop: Sequence[int],
    state: BrainState | None,
    weights: str | None,
) -> Iterator[Generation]:
    num_lanes = len(rows)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(num_lanes, model.vocab_size, dtype=torch.bool)
    running = list(range(num_lanes))
    last = torch.zeros(num_lanes, dtype=torch.int64)
    for made in range(0, max_new_tokens, chunk_tokens):
        size = min(chunk_tokens, max_new_tokens - made)
        part = generate_prompts(
            model,
            [rows[lane] for lane in running],
            max_new_tokens=size,
            sampling=sampling,
            seed=seed,
            stop=stop,
            state=None if state is None else state.select(running),
            lanes=torch.tensor(running),
            seen=None if seen is None else seen[running],
            weights=weights,
        )
        state = part.state if len(running) == num_lanes else _put(state, running, part.state)
        replies = part.replies()
        tokens = last[:, None].repeat(1, size)
        log_probs, lengths = torch.zeros(num_lanes, size), torch.zeros(num_lanes, dtype=torch.int64)
        tokens[running], log_probs[running] = part.tokens.cpu(), part.log_probs.cpu()
        lengths[running] = torch.tensor([len(reply) for reply in replies])
        yield Generation(tokens, log_probs, lengths, state)
        last = tokens[:, -1]
        for lane, reply in zip(running, replies):
            if seen is not None:
                seen[lane, rows[lane].cpu()] = True
                seen[lane, reply] = True
            rows[lane] = last[lane : lane + 1]
        running = [lane for lane, reply in zip(running, replies) if reply[-1] not in stop]
        if not running:
            return


def _put(state: BrainState | None, lanes: list[int], part: BrainState) -> BrainState:
    """`state` with `part` in the given lanes."""
    assert state is not None
    index = torch.tensor(lanes, device=state.position.device)
    new = part.tensors()
    return BrainState.from_tensors({name: x.index_copy(0, index, new[name]) for name, x in state.tensors().items()})
