"""A sequence through `BrainSteps`, with a reverse pass for autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.precision import accumulation_dtype
from neurogen.brain import Brain, BrainOutput, BrainState, TokenEmbedding
from neurogen.modes.preallocated.buffers import Room
from neurogen.modes.preallocated.relay import carried_ids
from neurogen.modes.preallocated.steps import BrainSteps, flat_states, named_states


def make_room(brain: Brain, embedding: Tensor, lanes: int, num_tokens: int, *, saved: bool) -> Room:
    """A room in the types this brain computes in, torch.autocast's if it is on."""
    device = embedding.device
    dtype = accumulation_dtype(embedding)
    autocast = torch.is_autocast_enabled(device.type) and dtype == torch.float32
    matmul_dtype = torch.get_autocast_dtype(device.type) if autocast else embedding.dtype
    return Room(lanes, num_tokens, saved, device, dtype, matmul_dtype)


class _Pass:
    """One sequence: its inputs, its buffers, and the two directions."""

    def __init__(self, steps: BrainSteps, input_ids: Tensor, state: BrainState, document_start: Tensor | None) -> None:
        self.steps, self.input_ids, self.state = steps, input_ids, state
        self.ids = input_ids.t().contiguous()
        self.kept = None if document_start is None else (~document_start).t().to(steps.room.dtype)
        self.document_start = document_start

    def forward(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Broca's output `[T, B, D]`, the gates `[T, B, K]` (K = 0 without them), and the final states."""
        steps, num_tokens = self.steps, self.ids.shape[0]
        room = steps.room
        x = room.buffer(num_tokens, room.lanes, steps.relay.embedding.shape[1])
        num_columns = 0 if steps.gates is None else steps.gates.go.shape[-1]
        go = room.buffer(num_tokens, room.lanes, num_columns)
        steps.start(self.state)
        steps.relay.start_documents(self.document_start)
        for t in range(num_tokens):
            gates = steps.forward(t, self.ids[t], x[t], None if self.kept is None else self.kept[t])
            if gates is not None:
                go[t].copy_(gates)
        return x, go, flat_states(steps.layer_states(num_tokens))

    def backward(self, grad_x: Tensor, grad_go: Tensor, grad_states: list[Tensor]) -> list[Tensor]:
        """Gradients of the steps' inputs, then of the initial states."""
        steps = self.steps
        steps.prepare_backward(named_states(self.state.layers, grad_states))
        grad_x, grad_go = (grad.to(steps.room.dtype, copy=True) for grad in (grad_x, grad_go))
        for t in reversed(range(self.ids.shape[0])):
            steps.backward(t, grad_x[t], None if self.kept is None else self.kept[t], grad_go[t])
        return steps.gradients(self.input_ids) + flat_states(steps.grad_states())


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Pass, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*inputs)  # so that a weight changed before the reverse pass is noticed
        x, go, states = run.forward()
        return x, go, *states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_go: Tensor, *grad_states: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        grads = ctx.run.backward(grad_x, grad_go, list(grad_states))
        assert len(grads) == len(inputs)
        return None, *(grad.to(x.dtype) for grad, x in zip(grads, inputs))


def run_sequence(
    brain: Brain,
    embedding: TokenEmbedding,
    input_ids: Tensor,
    state: BrainState,
    document_start: Tensor | None,
) -> BrainOutput:
    """Run `input_ids` `[B, T]` from `state`; see `Brain.forward`."""
    lanes, num_tokens = input_ids.shape
    initial = flat_states(state.layers)
    trained = [*brain.parameters(), embedding.weight, *initial]
    saved = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    room = make_room(brain, embedding.weight, lanes, num_tokens, saved=saved)
    steps = BrainSteps(room, brain, embedding.weight)
    run = _Pass(steps, input_ids, state, document_start)
    if saved:
        x, go, *states = _Sequence.apply(run, *steps.inputs, *initial)
    else:
        with torch.no_grad():
            x, go, states = run.forward()
    return BrainOutput(
        broca_output=x.transpose(0, 1).to(embedding.weight.dtype),
        state=BrainState(
            state.position + num_tokens,
            carried_ids(input_ids, state.recent_ids, document_start),
            named_states(state.layers, states),
        ),
        activity=steps.activity(num_tokens),
        go=None if steps.gates is None else go.transpose(0, 1).to(steps.gates.proj.weight.dtype),
    )
