"""Generate token by token: the prompt as one sequence, then one step a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.sample import Sampling
from neurogen.brain import BrainState
from neurogen.errors import UserError

if TYPE_CHECKING:
    from neurogen.model import NeuroGen


@dataclass(frozen=True)
class Generation:
    """Tokens that follow the prompts.

    Arguments:
        tokens: `[B, N]` int64; after a lane's stop token its row is filled with that token.
        log_probs: `[B, N]` float32, under the model's own softmax; 0 in the filling.
        lengths: `[B]` int64, tokens of each lane up to and including its stop token.
        state: after the last token given to the brain, which has not read the last one drawn.
    """

    tokens: Tensor
    log_probs: Tensor
    lengths: Tensor
    state: BrainState


def check_prompt(input_ids: Tensor, vocab_size: int, max_new_tokens: int) -> None:
    """Raise UserError unless the prompt is `[B, T]` with T >= 1 and ids in the vocabulary, and there is work to do."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise UserError(
            f"the prompt has shape {tuple(input_ids.shape)}; it must be [lanes, tokens] with at least one token "
            "(a document-start id begins a text from nothing)"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(f"the prompt has token id {low if low < 0 else high}; the vocabulary is 0..{vocab_size - 1}")


def generate(
    model: NeuroGen,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    state: BrainState | None = None,
) -> Generation:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Arguments:
        model: runs in its own mode.
        input_ids: prompts, `[B, T]`, T >= 1.
        max_new_tokens: N >= 1.
        temperature, top_k, top_p, min_p, repetition_penalty: see `kernels.sample.Sampling`; temperature 0 is greedy.
            The penalty applies to tokens of the prompt and of the reply.
        seed: of the draws, which also depend on lane and position alone.
        stop: ids that end a lane.
        state: what the lanes have read before the prompt; nothing if None.

    Raises:
        UserError: a prompt, an id or a sampling setting is out of range.
    """
    check_prompt(input_ids, model.vocab_size, max_new_tokens)
    try:
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    except ValueError as error:
        raise UserError(str(error)) from error
    input_ids = input_ids.to(model.device)
    lanes = torch.arange(input_ids.shape[0], device=model.device)
    stop_ids = torch.tensor(list(stop), dtype=torch.int64, device=model.device)
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(len(lanes), model.vocab_size, dtype=torch.bool, device=model.device)
        seen.scatter_(1, input_ids, True)

    state = model.init_state(len(lanes)) if state is None else state
    read, done = input_ids, torch.zeros_like(lanes, dtype=torch.bool)
    last = torch.zeros_like(lanes)
    tokens, log_probs, lengths = [], [], torch.zeros_like(lanes)
    for _ in range(max_new_tokens):
        out = model.mode.sequence(model.brain, model.embedding, read, state, None)
        state = out.state
        drawn = model.decoder.decode_and_sample(
            out.broca_output[:, -1],
            sampling,
            seed=seed,
            lanes=lanes,
            positions=state.position,
            seen=seen,
            backend=model.mode.backend,
        )
        last = torch.where(done, last, drawn.tokens)
        tokens.append(last)
        log_probs.append(drawn.log_probs.masked_fill(done, 0.0))
        lengths += ~done
        if seen is not None:
            seen.scatter_(1, last[:, None], True)
        if len(stop_ids):
            done = done | torch.isin(last, stop_ids)
            if bool(done.all()):
                break
        read = last[:, None]
    return Generation(torch.stack(tokens, 1), torch.stack(log_probs, 1), lengths, state)
