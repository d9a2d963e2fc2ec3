"""Generate token by token: the prompt as one sequence, then one step a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from neurogen.brain import BrainState
from neurogen.brain.dropout import evaluating
from neurogen.errors import UserError
from neurogen.generation.fit import check_weights
from neurogen.generation.request import Generation, Request, check_prompt, check_stop, make_sampling
from neurogen.probes import to_device

if TYPE_CHECKING:
    from neurogen.model import NeuroGen


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
    weights: str | None = None,
) -> Generation:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Arguments:
        model: runs in its own mode, which gives the same tokens as any other.
        input_ids: prompts, `[B, T]`, T >= 1.
        max_new_tokens: N >= 1.
        temperature, top_k, top_p, min_p, repetition_penalty: see `kernels.sample.Sampling`; temperature 0 is greedy.
            The penalty applies to tokens of the prompt and of the reply.
        seed: of the draws, which also depend on lane and position alone.
        stop: ids that end a lane.
        state: what the lanes have read before the prompt; nothing if None.
        weights: `int8` to round matrices and decoder, a scale a row, while tokens are drawn, which takes mode fused and
            one lane; None leaves them as they are. A prompt is read from them as they are in any case, but for its last
            token.

    Raises:
        UserError: a prompt, an id, a state or a sampling setting is out of range, or `weights` are not to be had.
    """
    check_prompt(input_ids, model.vocab_size, max_new_tokens)
    check_weights(model, weights, input_ids.shape[0])
    sampling = make_sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    if state is None:
        state = model.init_state(input_ids.shape[0])
    elif state.lanes != input_ids.shape[0]:
        raise UserError(f"the state has {state.lanes} lanes and the prompt {input_ids.shape[0]}; make them equal")
    request = Request(
        input_ids=input_ids.to(model.device, torch.int64, non_blocking=True),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop=check_stop(stop, model.vocab_size),
        state=state,
        weights=weights,
    )
    with evaluating(model):
        return model.mode.generate(model, request)


class Reader(Protocol):
    """What the host learns of the tokens while they are made."""

    def read(self, tokens: Tensor, done: Tensor) -> tuple[Tensor, bool]:
        """Given the tokens just drawn and which lanes are done, both `[B]`: the ids to give the brain next, and whether
        every lane is known to be done."""
        ...


class PolledReader:
    """Reads no token. With stop ids, a flag comes over when it comes over: the loop never waits for it, and a GPU may
    draw some tokens in vain after the last stop."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self._can_stop = bool(request.stop)
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._flag = torch.zeros((), dtype=torch.bool, pin_memory=self._event is not None)
        self._on_device = torch.zeros((), dtype=torch.bool, device=device)
        self._value = self._flag.numpy()
        self._pending = False

    def read(self, tokens: Tensor, done: Tensor) -> tuple[Tensor, bool]:
        return tokens, self._can_stop and self.all_done(done)

    def all_done(self, done: Tensor) -> bool:
        """Whether an earlier call's `done` was true everywhere; on the CPU, whether this one is."""
        if self._event is not None and self._pending:
            if not self._event.query():
                return False
            self._pending = False
            if self._value:
                return True
        torch.all(done, dim=0, out=self._on_device)
        self._flag.copy_(self._on_device, non_blocking=True)
        if self._event is None:
            return bool(self._value)
        self._event.record()
        self._pending = True
        return False


class HostReader:
    """Reads every token on the host; the next step is given the device's own tensor."""

    def __init__(self, request: Request) -> None:
        self._stop = frozenset(request.stop)

    def read(self, tokens: Tensor, done: Tensor) -> tuple[Tensor, bool]:
        # A done lane's row is filled with its stop token, so that the tokens alone tell which lanes are done.
        return tokens, self._stop.issuperset(tokens.tolist())


class HostCopyReader(HostReader):
    """Reads every token on the host and sends it back from there."""

    def read(self, tokens: Tensor, done: Tensor) -> tuple[Tensor, bool]:
        ids = tokens.tolist()
        return to_device(torch.tensor(ids), tokens.device), self._stop.issuperset(ids)


def token_loop(model: NeuroGen, request: Request, reader: Reader) -> Generation:
    """Read the prompt as one sequence, then draw tokens one at a time, each step a sequence of one token."""
    device = request.input_ids.device
    lanes, seen = request.lane_numbers(), request.seen_tokens(model.vocab_size)
    stop_ids = torch.tensor(request.stop, dtype=torch.int64).to(device, non_blocking=True)

    state, read = request.state, request.input_ids
    done = torch.zeros_like(lanes, dtype=torch.bool)
    last, lengths = torch.zeros_like(lanes), torch.zeros_like(lanes)
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    for n in range(request.max_new_tokens):
        out = model.mode.sequence(model.brain, model.embedding, read, state, None)
        state = freeze_lanes(done, state, out.state) if request.stop and n > 0 else out.state
        drawn = model.mode.draw(
            model.decoder,
            out.broca_output[:, -1],
            request.sampling,
            seed=request.seed,
            lanes=lanes,
            positions=state.position,
            seen=seen,
        )
        last = torch.where(done, last, drawn.tokens)
        tokens.append(last)
        log_probs.append(drawn.log_probs.masked_fill(done, 0.0))
        lengths += ~done
        if seen is not None:
            seen.scatter_(1, last[:, None], True)
        if request.stop:
            done = done | torch.isin(last, stop_ids)
        next_ids, finished = reader.read(last, done)
        if finished:
            break
        read = next_ids[:, None]
    num_missing = request.max_new_tokens - len(tokens)
    filling = last[:, None].expand(-1, num_missing)
    return Generation(
        tokens=torch.cat([torch.stack(tokens, 1), filling], dim=1),
        log_probs=torch.nn.functional.pad(torch.stack(log_probs, 1), (0, num_missing)),
        lengths=lengths,
        state=state,
    )


def freeze_lanes(done: Tensor, before: BrainState, after: BrainState) -> BrainState:
    """`after`, but `before` in the lanes that are done: a finished reply's state must not read its own filling."""
    old = before.tensors()
    new = after.tensors()
    return BrainState.from_tensors(
        {name: torch.where(done.view(-1, *[1] * (x.dim() - 1)), old[name], x) for name, x in new.items()}
    )
