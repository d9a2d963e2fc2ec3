"""Generation in buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype, no_autocast
from neurogen.brain import BrainState, Decoder
from neurogen.generation.loop import PolledReader
from neurogen.generation.request import Generation, Request
from neurogen.modes.preallocated.buffers import Norm, Projection, Room
from neurogen.modes.preallocated.sample import SampleStep
from neurogen.modes.preallocated.sequence import make_room
from neurogen.modes.preallocated.steps import BrainSteps
from neurogen.probes import stage

if TYPE_CHECKING:
    from neurogen.model import NeuroGen


class _DecodeStep:
    """Broca's output `[B, D]` to logits `[B, V]`."""

    def __init__(self, room: Room, decoder: Decoder) -> None:
        self.norm = Norm(room, decoder.weight.shape[1], decoder.eps)
        self.proj = Projection(room, decoder.weight.to(room.matmul_dtype))

    def forward(self, x: Tensor) -> Tensor:
        self.proj.input(0).copy_(self.norm.forward(0, x))
        return self.proj.forward(0)


class _Lanes:
    """What generation keeps of each lane: ids read last, position, tokens drawn, and whether it is done."""

    def __init__(self, request: Request, room: Room) -> None:
        lanes, device = room.lanes, room.device
        self.recent_ids = request.state.recent_ids.clone()
        self.shifted = torch.empty_like(self.recent_ids)
        self.position = request.state.position.clone()
        self.last = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.done = torch.zeros(lanes, dtype=torch.bool, device=device)
        self.going, self.stopped = torch.ones_like(self.done), torch.zeros_like(self.done)
        self.advance = torch.zeros_like(self.last)
        self.stop_ids = torch.tensor(request.stop, dtype=torch.int64).to(device, non_blocking=True)
        num_new = request.max_new_tokens
        self.tokens = torch.empty(num_new, lanes, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(num_new, lanes, device=device)
        self.lengths = torch.zeros_like(self.last)

    def read(self, ids: Tensor) -> None:
        """Note that the brain has read ids `[B]`, in the lanes that go on."""
        self.shifted[:, :-1].copy_(self.recent_ids[:, 1:])
        self.shifted[:, -1].copy_(ids)
        torch.where(self.going.unsqueeze(-1), self.shifted, self.recent_ids, out=self.recent_ids)
        self.position.add_(self.advance.copy_(self.going))

    def write(self, n: int, tokens: Tensor, log_probs: Tensor) -> None:
        """Note the n-th draw of every lane."""
        torch.where(self.done, self.last, tokens, out=self.last)
        self.tokens[n].copy_(self.last)
        torch.where(self.done, self.log_probs[n], log_probs, out=self.log_probs[n])
        self.lengths.add_(self.advance.copy_(self.going))
        for stop_id in self.stop_ids.unbind():
            torch.eq(self.last, stop_id, out=self.stopped)
            self.done.logical_or_(self.stopped)
        torch.logical_not(self.done, out=self.going)


def generate_in_buffers(model: NeuroGen, request: Request) -> Generation:
    """Continue the request's prompts; see `neurogen.generation.generate`."""
    input_ids = request.input_ids.t().contiguous()
    num_prompt, num_lanes = input_ids.shape
    room = make_room(model.brain, model.embedding.weight, num_lanes, 1, saved=False)
    assert room.dtype == accumulation_dtype(model.decoder.weight)
    with no_autocast(input_ids):
        steps = BrainSteps(room, model.brain, model.embedding.weight)
        decode = _DecodeStep(room, model.decoder)
        sample = SampleStep(room, model.vocab_size, request.sampling, request.seed)
        lanes = _Lanes(request, room)
        reader = PolledReader(request, room.device)
        x = room.buffer(num_lanes, model.config.embedding_dim)
        sample.number_lanes(request.lane_numbers())
        seen = request.seen_tokens(model.vocab_size)
        if sample.seen is not None and seen is not None:
            sample.seen.copy_(seen)
        steps.start(request.state)
        steps.relay.start_documents(None)
        for t in range(num_prompt):
            steps.forward(t, input_ids[t], x, None)
            lanes.read(input_ids[t])
        t = num_prompt
        for n in range(request.max_new_tokens):
            if n > 0:
                steps.forward(t, lanes.last, x, None)
                if request.stop:
                    steps.freeze(t, lanes.done)
                lanes.read(lanes.last)
                t += 1
            with stage("decode"):
                logits = decode.forward(x)
            with stage("sample"):
                lanes.write(n, *sample.draw(logits, lanes.position))
            if sample.seen is not None:
                sample.seen.scatter_(1, lanes.last.unsqueeze(-1), True)
            _, finished = reader.read(lanes.last, lanes.done)
            if finished:
                lanes.tokens[n + 1 :] = lanes.last
                break
        state = BrainState(lanes.position, lanes.recent_ids, steps.layer_states(t))
        return Generation(lanes.tokens.t(), lanes.log_probs.t(), lanes.lengths, state)
