"""Prompts of different lengths in one call: each is read exactly, then all go on together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.sample import Sampling
from neurogen.brain import BrainState
from neurogen.brain.dropout import evaluating
from neurogen.errors import UserError
from neurogen.generation.fit import check_weights
from neurogen.generation.request import Generation, Request, check_prompt, check_stop

if TYPE_CHECKING:
    from neurogen.model import NeuroGen

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]

GROUP_LANES = 64  # lanes that generate side by side; more go in groups
PREFILL_WINDOW = 4096  # tokens of a prompt read at once, so that long prompts need no more memory than this


def check_prompts(prompts: Prompts, vocab_size: int, max_new_tokens: int) -> list[Tensor]:
    """Prompts as one row of ids a lane, int64.

    Raises:
        UserError: no prompt, an empty one, one that is not a row of ids, an id outside the vocabulary.
    """
    if isinstance(prompts, Tensor):
        check_prompt(prompts, vocab_size, max_new_tokens)
        return list(prompts.to(torch.int64))
    rows = [torch.as_tensor(prompt, dtype=None if len(prompt) else torch.int64) for prompt in prompts]
    if not rows:
        raise UserError("there is no prompt; give at least one")
    for i, row in enumerate(rows):
        if row.dim() != 1 or len(row) == 0:
            raise UserError(
                f"prompt {i} has shape {tuple(row.shape)}; it must be a row of at least one token id "
                "(a document-start id begins a text from nothing)"
            )
        check_prompt(row[None], vocab_size, max_new_tokens)
    return [row.to(torch.int64) for row in rows]


@torch.no_grad()
def generate_prompts(
    model: NeuroGen,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop: Sequence[int] = (),
    state: BrainState | None = None,
    lanes: Tensor | None = None,
    seen: Tensor | None = None,
    weights: str | None = None,
) -> Generation:
    """Continue prompts of any lengths, B in number.

    Arguments:
        model: runs in its own mode.
        prompts: ids `[B, T]`, or B rows of ids.
        max_new_tokens: N >= 1.
        sampling: how tokens are drawn.
        seed: of the draws, which depend on it, the lane's number, the position and nothing else: what a lane says does
            not depend on the others.
        stop: ids that end a lane.
        state: what the lanes have read before; nothing if None.
        lanes: `[B]` int64, the numbers of the lanes; 0 to B - 1 if None.
        seen: `[B, V]` bool, tokens read before that a repetition penalty counts besides those of the prompts.
        weights: see `neurogen.generation.generate`.

    Raises:
        UserError: a prompt, an id, a state or a setting is out of range, or `weights` are not to be had.
    """
    rows = check_prompts(prompts, model.vocab_size, max_new_tokens)
    num_lanes = len(rows)
    check_weights(model, weights, num_lanes)
    stop_ids = check_stop(stop, model.vocab_size)
    for name, count in (
        ("state", None if state is None else state.lanes),
        ("lanes", None if lanes is None else len(lanes)),
        ("seen", None if seen is None else len(seen)),
    ):
        if count is not None and count != num_lanes:
            raise UserError(f"{name} is for {count} lanes and there are {num_lanes} prompts; make them equal")
    if state is not None:
        state.check_fits(model.init_state(num_lanes))
    numbers = torch.arange(num_lanes) if lanes is None else lanes
    parts = []
    with evaluating(model):
        for start in range(0, num_lanes, GROUP_LANES):
            group = range(start, min(start + GROUP_LANES, num_lanes))
            chosen = rows[group.start : group.stop]
            before = None if state is None else state.select(list(group))
            request = Request(
                input_ids=torch.stack([row[-1:] for row in chosen]).to(model.device),
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
                stop=stop_ids,
                state=read_all_but_last(model, chosen, before),
                lanes=numbers[group.start : group.stop].to(model.device),
                seen=_seen(model, chosen, None if seen is None else seen[group.start : group.stop], sampling),
                weights=weights,
            )
            parts.append(model.mode.generate(model, request))
    if len(parts) == 1:
        return parts[0]
    return Generation(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.log_probs for part in parts]),
        torch.cat([part.lengths for part in parts]),
        BrainState.cat([part.state for part in parts]),
    )


def _seen(model: NeuroGen, rows: Sequence[Tensor], before: Tensor | None, sampling: Sampling) -> Tensor | None:
    if sampling.repetition_penalty == 1:
        return None
    seen = torch.zeros(len(rows), model.vocab_size, dtype=torch.bool)
    for lane, row in enumerate(rows):
        seen[lane, row.cpu()] = True
    seen = seen.to(model.device)
    return seen if before is None else seen | before.to(model.device)


@torch.no_grad()
def read_all_but_last(model: NeuroGen, rows: Sequence[Tensor], state: BrainState | None) -> BrainState:
    """The state of B lanes after all tokens of each row but its last, which a reply begins by reading.

    New lanes are read side by side, shorter ones behind filling that a document start cuts off: their states are those
    of a lane that never saw it. Lanes with a past are read in groups of equal length.
    """
    lengths = [len(row) - 1 for row in rows]
    if state is None:
        return _read_aligned(model, [row[:-1] for row in rows], max(lengths))
    parts: list[tuple[list[int], BrainState]] = []
    for length in sorted(set(lengths)):
        group = [lane for lane in range(len(rows)) if lengths[lane] == length]
        ids = torch.stack([rows[lane][:-1] for lane in group]).to(model.device)
        parts.append((group, read(model, ids, state.select(group))))
    order = [lane for group, _ in parts for lane in group]
    back = sorted(range(len(order)), key=order.__getitem__)
    return BrainState.cat([part for _, part in parts]).select(back)


def _read_aligned(model: NeuroGen, rows: list[Tensor], longest: int) -> BrainState:
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    start = torch.zeros(len(rows), longest, dtype=torch.bool)
    for lane, row in enumerate(rows):
        if len(row):
            ids[lane, longest - len(row) :] = row.cpu()
            start[lane, longest - len(row)] = True
    state = read(model, ids.to(model.device), model.init_state(len(rows)), start.to(model.device))
    lengths = torch.tensor([len(row) for row in rows])
    if bool((lengths == 0).any()):
        state = state.reset(lengths == 0)
    return BrainState(lengths.to(state.position), state.recent_ids, state.layers)


@torch.no_grad()
def read(model: NeuroGen, input_ids: Tensor, state: BrainState, document_start: Tensor | None = None) -> BrainState:
    """The state after `input_ids` `[B, T]`, T >= 0, on the model's device; nothing is predicted."""
    for start in range(0, input_ids.shape[1], PREFILL_WINDOW):
        window = slice(start, start + PREFILL_WINDOW)
        starts = None if document_start is None else document_start[:, window]
        state = model.mode.sequence(model.brain, model.embedding, input_ids[:, window], state, starts).state
    return state
