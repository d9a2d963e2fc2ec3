"""A memory layer's circuit, a token at a time in buffers, and its reverse pass."""

from __future__ import annotations

import torch
from torch import Tensor

from neurogen.brain.regions import MemoryLayer
from neurogen.brain.state import MemoryState, ShiftedMemoryState
from neurogen.modes.preallocated.buffers import (
    Norm,
    Projection,
    Room,
    normalize,
    normalize_backward,
    sigmoid_backward,
    silu,
    silu_backward,
)
from neurogen.modes.preallocated.token_shift import TokenShiftStep

AnyMemoryState = MemoryState | ShiftedMemoryState


class MemoryStep:
    """The fast weights of `kernels.memory` in their recurrent form, the gated norm and the projections.

    Vectors are `[B, H, N]`; products of a matrix and a vector per head are batched over B * H.
    """

    def __init__(self, room: Room, layer: MemoryLayer) -> None:
        config = layer.config
        self.room, self.config = room, config
        lanes, heads, width = room.lanes, config.num_heads, config.head_width
        self.means = room.mean(config.head_width, config.norm_eps)
        self.sum_of_squares = room.mean(1, config.norm_eps)
        self.norm = Norm(room, config.embedding_dim, config.norm_eps)
        self.shift = None if layer.shift is None else TokenShiftStep(room, layer.shift)
        self.in_proj = Projection(room, layer.in_proj.weight.to(room.matmul_dtype))
        self.forget = Projection(room, layer.forget.weight, layer.forget.bias)
        self.write = None if layer.write is None else Projection(room, layer.write.weight, layer.write.bias)
        self.out_proj = Projection(room, layer.out_proj.weight.to(room.matmul_dtype))
        vector, number = (lanes, heads, width), (lanes, heads, 1)
        self.fast_weight = room.state_tape(lanes, heads, width, width)
        self.query, self.key, self.normed = (room.tape(*vector) for _ in range(3))
        self.query_scale, self.key_scale, self.scale = (room.tape(*number) for _ in range(3))
        self.decay, self.retained = room.tape(lanes, heads), room.tape(lanes, heads)
        self.error, self.written = room.tape(*vector), room.tape(*vector)
        self.write_rate = room.tape(*number)
        self.read, self.scratch, self.gate = (room.buffer(*vector) for _ in range(3))

    @property
    def projections(self) -> list[Projection]:
        return [p for p in (self.in_proj, self.out_proj, self.forget, self.write) if p is not None]

    @property
    def inputs(self) -> list[Tensor]:
        tensors = [tensor for projection in self.projections for tensor in projection.inputs]
        return tensors if self.shift is None else [*tensors, self.shift.taps]

    def start(self, state: AnyMemoryState) -> None:
        self.fast_weight[0].copy_(state.fast_weight)
        if self.shift is not None:
            assert isinstance(state, ShiftedMemoryState)
            self.shift.start(state.recent)

    def state(self, t: int) -> AnyMemoryState:
        """After t tokens."""
        slot = t % self.fast_weight.shape[0]
        fast_weight = self.fast_weight[slot].clone()
        if self.shift is None:
            return MemoryState(fast_weight)
        return ShiftedMemoryState(fast_weight, self.shift.recent[slot].clone())

    def freeze(self, t: int, done: Tensor) -> None:
        """Put the state after token t back to the one before it in the lanes that are done, `[B]` bool."""
        before, after = t % self.fast_weight.shape[0], (t + 1) % self.fast_weight.shape[0]
        for tape in (self.fast_weight,) if self.shift is None else (self.fast_weight, self.shift.recent):
            frozen = done.view(-1, *[1] * (tape.dim() - 2))
            torch.where(frozen, tape[before], tape[after], out=tape[after])

    def _columns(self, x: Tensor) -> Tensor:
        """`[B, H, N]` to `[B * H, N, 1]`."""
        return x.view(-1, x.shape[-1], 1)

    def _matrices(self, x: Tensor) -> Tensor:
        return x.view(-1, *x.shape[-2:])

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The in-projection's `[B, 4D]` as query, key, value and gate, views `[B, H, N]`."""
        return x.view(x.shape[0], 4, self.config.num_heads, -1).unbind(1)

    def forward(self, t: int, x: Tensor, kept: Tensor | None) -> None:
        """Token t: add to the workspace x `[B, D]` what is read; `kept` is `[B]`, 0 where a document starts."""
        i, before, after = self._slots(t)
        h = self.norm.forward(i, x)
        if self.shift is not None:
            self.shift.forward(t, h, kept, self.shift.scratch)
            h = self.shift.scratch
        self.in_proj.input(i).copy_(h)
        query, key, value, gate = self._parts(self.in_proj.forward(i))
        for raw, out, scale in (
            (query, self.query[i], self.query_scale[i]),
            (key, self.key[i], self.key_scale[i]),
        ):
            silu(raw, out=self.gate)
            normalize(self.gate, out, scale, self.scratch, self.sum_of_squares)
        self.forget.input(i).copy_(h)
        torch.sigmoid(self.forget.forward(i), out=self.decay[i])
        self.retained[i].copy_(self.decay[i])
        if kept is not None:
            self.retained[i].mul_(kept.unsqueeze(-1))
        weight = self.fast_weight[after]
        torch.mul(self.fast_weight[before], self.retained[i][..., None, None], out=weight)
        written = value if self.write is None else self._correct(i, h, value, weight)
        weight.addcmul_(self.key[i].unsqueeze(-1), written.unsqueeze(-2))
        torch.bmm(self._matrices(weight).transpose(1, 2), self._columns(self.query[i]), out=self._columns(self.read))

        normalize(self.read, self.normed[i], self.scale[i], self.scratch, self.means)
        silu(gate, out=self.gate)
        torch.mul(self.normed[i], self.gate, out=self.out_proj.input(i).view(self.gate.shape))
        x.add_(self.out_proj.forward(i))

    def _correct(self, i: int, h: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        """The delta rule's write, beta (v - P^T k), P the retained weights."""
        assert self.write is not None
        self.write.input(i).copy_(h)
        torch.sigmoid(self.write.forward(i).unsqueeze(-1), out=self.write_rate[i])
        torch.bmm(self._matrices(weight).transpose(1, 2), self._columns(self.key[i]), out=self._columns(self.scratch))
        torch.sub(value, self.scratch, out=self.error[i])
        return torch.mul(self.error[i], self.write_rate[i], out=self.written[i])

    def _slots(self, t: int) -> tuple[int, int, int]:
        num_slots = self.fast_weight.shape[0]
        return t % self.query.shape[0], t % num_slots, (t + 1) % num_slots

    def prepare_backward(self, grad_state: AnyMemoryState) -> None:
        for projection in self.projections:
            projection.prepare_backward()
        if self.shift is not None:
            assert isinstance(grad_state, ShiftedMemoryState)
            self.shift.prepare_backward(grad_state.recent)
        self.grad_weight = grad_state.fast_weight.to(self.room.dtype, copy=True)
        self.product = torch.empty_like(self.grad_weight)
        self.grad_read, self.grad_query, self.grad_key, self.grad_value, self.grad_gate, self.grad_error = (
            torch.empty_like(self.read) for _ in range(6)
        )
        self.sums = self.read.new_empty(*self.read.shape[:-1], 1)
        self.grad_h = self.read.new_empty(self.read.shape[0], self.config.embedding_dim)
        self.grad_mixed = torch.empty_like(self.grad_h)

    def backward(self, t: int, grad_x: Tensor, kept: Tensor | None) -> None:
        """Token t in reverse: add to grad_x `[B, D]` what comes through the circuit."""
        i, before, _ = self._slots(t)
        self.out_proj.grad_output(i).copy_(grad_x)
        grad_written = self.out_proj.backward(i).view(self.read.shape)
        query, key, value, gate = self._parts(self.in_proj.output[i])
        grads = self._parts(self.in_proj.grad_output(i))
        normed = self.normed[i]
        torch.mul(grad_written, normed, out=self.grad_gate)
        silu_backward(self.grad_gate, gate, grad_input=grads[3])
        silu(gate, out=self.gate)
        torch.mul(grad_written, self.gate, out=self.grad_read)
        normalize_backward(
            self.grad_read, normed, self.scale[i], self.scratch, self.sums, self.means, out=self.grad_read
        )
        self._weight_backward(t, value)
        grads[2].copy_(self.grad_value)
        torch.bmm(
            self.grad_weight.view(-1, 1, self.product[0, 0].numel()),
            self.fast_weight[before].view(-1, self.product[0, 0].numel(), 1),
            out=self.sums.view(-1, 1, 1),
        )
        self.grad_weight.mul_(self.retained[i][..., None, None])
        grad_decay = self.sums.squeeze(-1)
        if kept is not None:
            grad_decay.mul_(kept.unsqueeze(-1))
        sigmoid_backward(grad_decay, self.decay[i], grad_input=self.forget.grad_output(i))
        for grad, normed, scale, raw, out in (
            (self.grad_query, self.query[i], self.query_scale[i], query, grads[0]),
            (self.grad_key, self.key[i], self.key_scale[i], key, grads[1]),
        ):
            normalize_backward(grad, normed, scale, self.scratch, self.sums, self.sum_of_squares, out=grad)
            silu_backward(grad, raw, grad_input=out)
        self._input_backward(t, grad_x, kept)

    def _weight_backward(self, t: int, value: Tensor) -> None:
        """From the gradient at the read and at S_t to those at q, k, v and P, the retained part of S_{t-1}."""
        i, before, after = self._slots(t)
        weight, grad = self.fast_weight[after], self.grad_weight
        matrices = self._matrices(grad)
        torch.bmm(self._matrices(weight), self._columns(self.grad_read), out=self._columns(self.grad_query))
        grad.addcmul_(self.query[i].unsqueeze(-1), self.grad_read.unsqueeze(-2))
        if self.write is None:
            self.scratch.copy_(value)
            torch.bmm(matrices, self._columns(self.scratch), out=self._columns(self.grad_key))
            torch.bmm(matrices.transpose(1, 2), self._columns(self.key[i]), out=self._columns(self.grad_value))
            return
        torch.bmm(matrices, self._columns(self.written[i]), out=self._columns(self.grad_key))
        torch.bmm(matrices.transpose(1, 2), self._columns(self.key[i]), out=self._columns(self.grad_error))
        torch.mul(self.grad_error, self.error[i], out=self.scratch)
        torch.sum(self.scratch, -1, keepdim=True, out=self.sums)
        sigmoid_backward(self.sums, self.write_rate[i], grad_input=self.write.grad_output(i).unsqueeze(-1))
        # The error v - P^T k has gradient beta du, which goes to v as it is and to P^T k with the other sign.
        torch.mul(self.grad_error, self.write_rate[i], out=self.grad_value)
        torch.mul(self.fast_weight[before], self.retained[i][..., None, None], out=self.product)
        self._columns(self.grad_key).baddbmm_(self._matrices(self.product), self._columns(self.grad_value), alpha=-1.0)
        grad.addcmul_(self.key[i].unsqueeze(-1), self.grad_value.unsqueeze(-2), value=-1.0)

    def _input_backward(self, t: int, grad_x: Tensor, kept: Tensor | None) -> None:
        i = self._slots(t)[0]
        grad = self.grad_h if self.shift is None else self.grad_mixed
        grad.copy_(self.in_proj.backward(i)).add_(self.forget.backward(i))
        if self.write is not None:
            grad.add_(self.write.backward(i))
        if self.shift is not None:
            self.shift.backward(t, grad, kept, self.grad_h)
        self.norm.backward(i, self.grad_h, grad_x)

    def gradients(self) -> list[Tensor]:
        grads = [grad for projection in self.projections for grad in projection.gradients()]
        return grads if self.shift is None else [*grads, self.shift.grad_taps]

    def grad_state(self) -> AnyMemoryState:
        if self.shift is None:
            return MemoryState(self.grad_weight)
        return ShiftedMemoryState(self.grad_weight, self.shift.grad_recent)
