"""Token by token through the host, as the system this one grew from ran."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.decode import IGNORE_INDEX, DecodeOutput
from kernels.linear import one_copy_a_weight
from kernels.relay import NO_TOKEN
from neurogen.brain import Brain, BrainOutput, BrainState, Decoder, TokenEmbedding
from neurogen.generation.loop import HostCopyReader, token_loop
from neurogen.modes.join import join_outputs
from neurogen.modes.unfused import UnfusedMode
from neurogen.probes import stage, to_device, to_host

if TYPE_CHECKING:
    from neurogen.generation import Generation, Request
    from neurogen.model import NeuroGen


class _HostRoundTrip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return to_device(to_host(x), x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return to_device(to_host(grad), grad.device)


def host_round_trip(x: Tensor) -> Tensor:
    """x copied to host memory and back, as new tensors; its gradient takes the same way."""
    return _HostRoundTrip.apply(x)


class NaiveMode(UnfusedMode):
    """Token by token; the embedding row and Broca's output go to the host and back, and every step makes new tensors.

    One synchronisation a token: generation reads the sampled token, training whether the arg-max was right. The vectors
    pass through pinned memory in stream order and are not waited for.
    """

    name = "naive"

    def sequence(
        self,
        brain: Brain,
        embedding: TokenEmbedding,
        input_ids: Tensor,
        state: BrainState,
        document_start: Tensor | None,
    ) -> BrainOutput:
        if input_ids.shape[1] == 0:
            return super().sequence(brain, embedding, input_ids, state, document_start)
        with one_copy_a_weight():
            return join_outputs(self._steps(brain, embedding, input_ids, state, document_start))

    def _steps(
        self,
        brain: Brain,
        embedding: TokenEmbedding,
        input_ids: Tensor,
        state: BrainState,
        document_start: Tensor | None,
    ) -> list[BrainOutput]:
        """What each token leaves."""
        rows = list(embedding(state.recent_ids.clamp_min(0)).unbind(1))
        steps: list[BrainOutput] = []
        for t in range(input_ids.shape[1]):
            starts = None if document_start is None else document_start[:, t : t + 1].clone()
            token_ids = input_ids[:, t : t + 1].clone()
            with stage("embed"):
                rows.append(host_round_trip(embedding(token_ids[:, 0])))
                x, recent_ids = self._relay(brain, rows, token_ids, state.recent_ids, starts)
                rows.pop(0)
            with stage("cognitive_step"):
                out = brain.think(x, recent_ids, state, starts, backend=self.backend)
                broca_output = host_round_trip(out.broca_output)
            steps.append(BrainOutput(broca_output, out.state, out.activity, out.go))
            state = out.state
        return steps

    def _relay(
        self, brain: Brain, rows: list[Tensor], token_ids: Tensor, recent_ids: Tensor, document_start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The thalamus over a table of the few rows that came through the host, `[B, D]` each, oldest first.

        A row's id in that table is lane * number of rows + place; the ids carried on are turned back into the
        vocabulary's.
        """
        num_rows = len(rows)
        table = torch.stack(rows, dim=1).flatten(0, 1)
        places = torch.arange(table.shape[0], device=table.device).view(-1, num_rows)
        history = torch.cat([recent_ids, token_ids], dim=1)
        local = torch.where(history == NO_TOKEN, NO_TOKEN, places)
        x, carried = brain.thalamus(local[:, -1:], table, local[:, :-1], document_start, self.backend)
        vocabulary_ids = history.flatten()[carried.clamp_min(0)]
        return x, torch.where(carried == NO_TOKEN, NO_TOKEN, vocabulary_ids)

    def loss(self, decoder: Decoder, broca_output: Tensor, target_ids: Tensor) -> DecodeOutput:
        num_tokens = target_ids.shape[1]
        if num_tokens == 0:
            return super().loss(decoder, broca_output, target_ids)
        total, num_correct = broca_output.new_zeros((), dtype=torch.float32), 0
        num_targets = (target_ids != IGNORE_INDEX).sum()
        with one_copy_a_weight():
            for t in range(num_tokens):
                step = super().loss(decoder, broca_output[:, t : t + 1].clone(), target_ids[:, t : t + 1].clone())
                total = total + step.loss * step.num_targets
                num_correct += int(step.num_correct)
        hits = to_device(torch.tensor(num_correct), total.device)
        return DecodeOutput(total / num_targets.clamp_min(1), hits, num_targets)

    def generate(self, model: NeuroGen, request: Request) -> Generation:
        """Every token is a sequence of its own, read on the host and sent back from there."""
        return token_loop(model, request, HostCopyReader(request))
