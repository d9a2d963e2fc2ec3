"""One token as a function of tensors alone, and the ways a host can run it N times."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.sample import Sampling, sample_logits
from neurogen.baselines import GPT, KeyValueCache, decode_step
from neurogen.brain import BrainState
from neurogen.model import NeuroGen
from neurogen.training.graph import capture

SAMPLING = Sampling()
SEED = 11


class Drawn(NamedTuple):
    """One token of B lanes: `[B]` ids, `[B]` log-probabilities, and the state by name after reading the ids given."""

    tokens: Tensor
    log_probs: Tensor
    state: dict[str, Tensor]


Step = Callable[[Tensor, dict[str, Tensor]], Drawn]


def brain_step(model: NeuroGen) -> Step:
    """Read ids `[B]` and draw the next in the model's mode; a state is what `BrainState.tensors` gives."""

    def step(token_ids: Tensor, state: dict[str, Tensor]) -> Drawn:
        before = BrainState.from_tensors(state)
        out = model.mode.sequence(model.brain, model.embedding, token_ids[:, None], before, None)
        drawn = model.mode.draw(
            model.decoder,
            out.broca_output[:, -1],
            SAMPLING,
            seed=SEED,
            lanes=torch.arange(token_ids.shape[0], device=token_ids.device),
            positions=out.state.position,
            seen=None,
        )
        return Drawn(drawn.tokens, drawn.log_probs, out.state.tensors())

    return step


def gpt_step(model: GPT, cache: KeyValueCache, *, fused: bool) -> Step:
    """Read ids `[B]` into the cache and draw the next; the state is `position`, 0-dimensional."""

    def step(token_ids: Tensor, state: dict[str, Tensor]) -> Drawn:
        position = state["position"]
        logits = decode_step(model, token_ids, position, cache, fused=fused)
        lanes = torch.arange(token_ids.shape[0], device=token_ids.device)
        after = position + 1
        drawn = sample_logits(logits, SAMPLING, seed=SEED, lanes=lanes, positions=after.expand_as(lanes))
        return Drawn(drawn.tokens, drawn.log_probs, {"position": after})

    return step


class Replayed:
    """Runs a step N times on tensors that stay where they are, recorded as a CUDA graph where there is a GPU.

    Arguments:
        step: recorded once, after a warm-up.
        first: `[B]` ids to read first.
        state: before the first token; it is kept and every call begins from it.
        num_tokens: N.
    """

    def __init__(self, step: Step, first: Tensor, state: dict[str, Tensor], num_tokens: int) -> None:
        self._first, self._initial = first, state
        self._num_tokens = num_tokens
        self._last = first.clone()
        self._state = {name: x.clone() for name, x in state.items()}
        self._cursor = torch.zeros(1, dtype=torch.int64, device=first.device)
        lanes = first.shape[0]
        self.tokens = torch.zeros(lanes, num_tokens, dtype=torch.int64, device=first.device)
        self.log_probs = torch.zeros(lanes, num_tokens, device=first.device)
        self._step = step
        self._advance: Callable[[], None] = self._run_step
        if first.device.type == "cuda":
            self._restart()
            self._advance = capture(self._run_step, first.device)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities, `[B, N]` each; the same tensors at every call."""
        self._restart()
        for _ in range(self._num_tokens):
            self._advance()
        return self.tokens, self.log_probs

    def _restart(self) -> None:
        self._cursor.zero_()
        self._last.copy_(self._first)
        for name, x in self._state.items():
            x.copy_(self._initial[name])

    def _run_step(self) -> None:
        drawn = self._step(self._last, self._state)
        # Warm-up runs more steps than a short reply has places.
        place = self._cursor % self._num_tokens
        self.tokens.index_copy_(1, place, drawn.tokens[:, None])
        self.log_probs.index_copy_(1, place, drawn.log_probs[:, None].float())
        self._cursor += 1
        self._last.copy_(drawn.tokens)
        for name, x in self._state.items():
            x.copy_(drawn.state[name])


class Launched:
    """Runs a step N times, launch by launch; arguments as for `Replayed`."""

    def __init__(self, step: Step, first: Tensor, state: dict[str, Tensor], num_tokens: int) -> None:
        self._step, self._first, self._state, self._num_tokens = step, first, state, num_tokens

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities, `[B, N]` each."""
        last, state = self._first, self._state
        tokens, log_probs = [], []
        for _ in range(self._num_tokens):
            last, log_prob, state = self._step(last, state)
            tokens.append(last)
            log_probs.append(log_prob)
        return torch.stack(tokens, 1), torch.stack(log_probs, 1)


def compiled(step: Step, device: torch.device) -> Step:
    """The step as one graph of torch.compile; on the CPU traced by it and run as it is, without a C++ compiler."""
    if device.type == "cuda":
        return torch.compile(step, fullgraph=True, dynamic=False)
    return torch.compile(step, fullgraph=True, dynamic=False, backend="eager")
