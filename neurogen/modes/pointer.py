"""Token by token over references."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.decode import DecodeOutput
from kernels.linear import one_copy_a_weight
from neurogen.brain import Brain, BrainOutput, BrainState, Decoder, TokenEmbedding
from neurogen.generation.loop import HostReader, token_loop
from neurogen.modes.join import join_outputs
from neurogen.modes.unfused import UnfusedMode

if TYPE_CHECKING:
    from neurogen.generation import Generation, Request
    from neurogen.model import NeuroGen


class PointerMode(UnfusedMode):
    """Token by token over views of rows; no vector is copied to the host.

    Generation reads each sampled token, one synchronisation a token; training reads nothing until the caller does.
    """

    name = "pointer"

    def sequence(
        self,
        brain: Brain,
        embedding: TokenEmbedding,
        input_ids: Tensor,
        state: BrainState,
        document_start: Tensor | None,
    ) -> BrainOutput:
        steps: list[BrainOutput] = []
        with one_copy_a_weight():
            for t in range(input_ids.shape[1]):
                starts = None if document_start is None else document_start[:, t : t + 1]
                steps.append(super().sequence(brain, embedding, input_ids[:, t : t + 1], state, starts))
                state = steps[-1].state
        if not steps:
            return super().sequence(brain, embedding, input_ids, state, document_start)
        return join_outputs(steps)

    def loss(self, decoder: Decoder, broca_output: Tensor, target_ids: Tensor) -> DecodeOutput:
        with one_copy_a_weight():
            steps = [
                super(PointerMode, self).loss(decoder, broca_output[:, t : t + 1], target_ids[:, t : t + 1])
                for t in range(target_ids.shape[1])
            ]
        if not steps:
            return super().loss(decoder, broca_output, target_ids)
        num_targets = torch.stack([step.num_targets for step in steps])
        losses = torch.stack([step.loss for step in steps])
        num_correct = torch.stack([step.num_correct for step in steps]).sum()
        total = num_targets.sum()
        return DecodeOutput((losses * num_targets).sum() / total.clamp_min(1), num_correct, total)

    def generate(self, model: NeuroGen, request: Request) -> Generation:
        """Every prompt token and every new one is a sequence of its own; each new one is read on the host."""
        return token_loop(model, request, HostReader(request))
