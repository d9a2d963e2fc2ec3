"""A cortex layer's circuit, a token at a time in buffers, and its reverse pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cortex import CEILINGS, GRADED_CEILING, CortexState
from kernels.cortex.reference import recurrent_weight
from kernels.cortex.spike import derivative
from neurogen.brain.regions import Activity, CortexLayer
from neurogen.modes.preallocated.buffers import (
    Norm,
    Projection,
    Room,
    normalize,
    normalize_backward,
    silu,
    silu_backward,
)


class CortexStep:
    """The ALIF circuit of `kernels.cortex`, its gated norm and its projections.

    Neurons are laid out `[K, B, C]`: K columns, B lanes, C neurons. What the weights are turned into before the
    recurrence (alpha, the drive's scale, the recurrent product) is computed with autograd outside.
    """

    def __init__(self, room: Room, layer: CortexLayer) -> None:
        config = layer.config
        self.room, self.config = room, config
        lanes, width = room.lanes, config.embedding_dim
        self.means = room.mean(config.column_width, config.norm_eps)
        self.threshold, self.keep_adapted = room.constant(config.threshold), room.constant(config.adaptation_decay)
        self.inverse_ceiling = room.constant(1.0 / CEILINGS[config.spike])
        columns = (config.num_columns, lanes, config.column_width)
        alpha = torch.sigmoid(layer.decay_logit).to(room.dtype)
        self.alpha = alpha.view(config.num_columns, 1, config.column_width)
        self.drive_scale = (1 - self.alpha).sqrt()
        self.recurrent = recurrent_weight(layer.lateral_weight.to(room.dtype), self.alpha, config.threshold)
        self.drive_bias = layer.drive_bias.to(room.dtype)
        self.norm = Norm(room, width, config.norm_eps)
        self.in_proj = Projection(room, layer.in_proj.weight.to(room.matmul_dtype))
        self.out_proj = Projection(room, layer.out_proj.weight.to(room.matmul_dtype))
        self.voltage, self.adaptation, self.spikes = (room.state_tape(*columns) for _ in range(3))
        self.drive = room.tape(*columns)
        self.excess = room.tape(*columns)
        by_lane = (lanes, config.num_columns, config.column_width)
        self.normed = room.tape(*by_lane)
        self.scale = room.tape(lanes, config.num_columns, 1)
        self.scratch, self.gate = room.buffer(*by_lane), room.buffer(*by_lane)
        self.num_fired, self.num_saturated = room.buffer(*columns), room.buffer(*columns)
        self.column_scratch = room.buffer(*columns)

    @property
    def inputs(self) -> list[Tensor]:
        return [
            *self.in_proj.inputs,
            *self.out_proj.inputs,
            self.drive_bias,
            self.alpha,
            self.drive_scale,
            self.recurrent,
        ]

    def _by_column(self, x: Tensor) -> Tensor:
        """`[..., B, D]` to a view `[..., K, B, C]`."""
        return x.unflatten(-1, (self.config.num_columns, -1)).movedim(-2, -3)

    def _by_lane(self, x: Tensor) -> Tensor:
        """`[K, B, C]` to a copy `[B, D]`."""
        return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(1)

    def start(self, state: CortexState) -> None:
        for tape, x in zip((self.voltage, self.adaptation, self.spikes), state):
            tape[0].copy_(self._by_column(x))
        self.num_fired.zero_()
        self.num_saturated.zero_()

    def state(self, t: int) -> CortexState:
        """After t tokens."""
        slot = t % self.voltage.shape[0]
        return CortexState(*(self._by_lane(tape[slot]) for tape in (self.voltage, self.adaptation, self.spikes)))

    def freeze(self, t: int, done: Tensor) -> None:
        """Put the state after token t back to the one before it in the lanes that are done, `[B]` bool."""
        before, after = t % self.voltage.shape[0], (t + 1) % self.voltage.shape[0]
        for tape in (self.voltage, self.adaptation, self.spikes):
            torch.where(done.view(1, -1, 1), tape[before], tape[after], out=tape[after])

    def activity(self, num_tokens: int) -> Activity:
        fired, saturated = (x.sum(1).flatten().to(torch.int32) for x in (self.num_fired, self.num_saturated))
        return Activity(fired, saturated, num_tokens * self.room.lanes)

    def forward(self, t: int, x: Tensor, kept: Tensor | None, go: Tensor | None) -> None:
        """Token t: add to the workspace x `[B, D]` what the circuit writes.

        Arguments:
            kept: `[B]`, 0 where a document starts, or None.
            go: the basal ganglia's gates `[B, K]`, or None.
        """
        i, before, after = self._slots(t)
        self.in_proj.input(i).copy_(self.norm.forward(i, x))
        drive, gate = self.in_proj.forward(i).chunk(2, dim=-1)
        v, a, s = self.voltage[before], self.adaptation[before], self.spikes[before]
        if kept is not None:
            for state in (v, a, s):
                state.mul_(kept.view(1, -1, 1))
        # The state in the `before` slots is from here on the one after the reset, as the reverse pass wants it.
        driven = self.drive[i]
        torch.add(self._by_column(drive), self._by_column(self.drive_bias.unsqueeze(0)), out=driven)
        self._advance(driven, v, a, s, i, after)
        self._count(self.spikes[after])

        spikes, normed = self.spikes[after].transpose(0, 1), self.normed[i]
        normalize(spikes, normed, self.scale[i], self.scratch, self.means)
        silu(gate, out=self.gate.view(gate.shape))
        written = self.out_proj.input(i).view(normed.shape)
        torch.mul(normed, self.gate, out=written)
        if go is not None:
            written.mul_(go.unsqueeze(-1))
        x.add_(self.out_proj.forward(i))

    def _slots(self, t: int) -> tuple[int, int, int]:
        num_slots = self.voltage.shape[0]
        return t % self.excess.shape[0], t % num_slots, (t + 1) % num_slots

    def _advance(self, driven: Tensor, v: Tensor, a: Tensor, s: Tensor, i: int, after: int) -> None:
        config = self.config
        torch.lerp(s, a, config.adaptation_decay, out=self.adaptation[after])
        voltage = self.voltage[after]
        torch.mul(driven, self.drive_scale, out=voltage)
        voltage.addcmul_(self.alpha, v).baddbmm_(s, self.recurrent)
        excess = self.excess[i]
        torch.sub(voltage, self.adaptation[after], alpha=config.adaptation_strength, out=excess)
        excess.sub_(self.threshold)
        if config.spike == "graded":
            torch.clamp(excess, 0.0, GRADED_CEILING, out=self.spikes[after])
        elif config.spike == "smooth":
            torch.tanh(excess, out=self.spikes[after])
        else:  # sign, then the negative ones to 0: a comparison would make a tensor of bools
            torch.sign(excess, out=self.spikes[after]).clamp_(min=0.0)

    def _count(self, spikes: Tensor) -> None:
        scratch = self.column_scratch
        torch.sign(spikes, out=scratch)
        self.num_fired.add_(scratch.clamp_(min=0.0) if self.config.spike == "smooth" else scratch)
        # At most 1, and 1 exactly at the ceiling; a smooth unit's is in [0, 1.02).
        torch.mul(spikes, self.inverse_ceiling, out=scratch)
        if self.config.spike == "smooth":
            scratch.abs_()
        self.num_saturated.add_(scratch.floor_())

    def prepare_backward(self, grad_state: CortexState) -> None:
        self.in_proj.prepare_backward()
        self.out_proj.prepare_backward()
        self.spike_derivative = derivative(self.excess, self.config.spike)
        self.grad_current = torch.empty_like(self.excess)  # at v_t, of which the drive and the lateral input are a part
        self.grad_v, self.grad_a, self.grad_s = (
            self._by_column(x).to(self.room.dtype).clone(memory_format=torch.contiguous_format) for x in grad_state
        )
        self.grad_normed, self.grad_gate = (torch.empty_like(self.gate) for _ in range(2))
        self.sums = self.scale.new_empty(self.scale.shape[1:])

    def backward(self, t: int, grad_x: Tensor, kept: Tensor | None, go: Tensor | None, grad_go: Tensor | None) -> None:
        """Token t in reverse: add to grad_x `[B, D]` what comes through the circuit, and to grad_go `[B, K]`."""
        i = t % self.excess.shape[0]
        config = self.config
        self.out_proj.grad_output(i).copy_(grad_x)
        grad_written = self.out_proj.backward(i).view(self.gate.shape)
        gate = self.in_proj.output[i][:, config.embedding_dim :]
        normed = self.normed[i]
        silu(gate, out=self.gate.view(gate.shape))
        if go is not None and grad_go is not None:
            torch.mul(normed, self.gate, out=self.scratch).mul_(grad_written)
            torch.sum(self.scratch, -1, out=self.sums.squeeze(-1))
            grad_go.add_(self.sums.squeeze(-1))
            grad_written.mul_(go.unsqueeze(-1))
        torch.mul(grad_written, self.gate, out=self.grad_normed)
        torch.mul(grad_written, normed, out=self.grad_gate)
        grad_drive, grad_gate = self.in_proj.grad_output(i).chunk(2, dim=-1)
        silu_backward(self.grad_gate.view(gate.shape), gate, grad_input=grad_gate)
        normalize_backward(
            self.grad_normed, normed, self.scale[i], self.scratch, self.sums, self.means, out=self.grad_normed
        )
        self.grad_s.add_(self.grad_normed.transpose(0, 1))
        self._retreat(i)
        torch.mul(self.grad_current[i], self.drive_scale, out=self._by_column(grad_drive))
        if kept is not None:
            for grad in (self.grad_v, self.grad_a, self.grad_s):
                grad.mul_(kept.view(1, -1, 1))
        self.norm.backward(i, self.in_proj.backward(i), grad_x)

    def _retreat(self, i: int) -> None:
        """From the gradients at v_t, a_t and s_t to those at v_{t-1}, a_{t-1} and s_{t-1}."""
        config = self.config
        grad_excess = self.grad_s.mul_(self.spike_derivative[i])
        self.grad_v.add_(grad_excess)
        self.grad_a.add_(grad_excess, alpha=-config.adaptation_strength)
        self.grad_current[i].copy_(self.grad_v)
        torch.bmm(self.grad_v, self.recurrent.transpose(1, 2), out=self.grad_s)
        self.grad_s.add_(self.grad_a, alpha=1.0 - config.adaptation_decay)
        self.grad_a.mul_(self.keep_adapted)
        self.grad_v.mul_(self.alpha)

    def gradients(self) -> list[Tensor]:
        grad, num_tokens = self.grad_current, self.grad_current.shape[0]
        voltage, spikes = self.voltage[:num_tokens], self.spikes[:num_tokens]
        grad_drive = grad * self.drive_scale
        flat = (spikes.movedim(1, 0).flatten(1, 2), grad.movedim(1, 0).flatten(1, 2))
        return [
            *self.in_proj.gradients(),
            *self.out_proj.gradients(),
            grad_drive.sum((0, 2)).flatten(),
            (grad * voltage).sum((0, 2)).unsqueeze(1),
            (grad * self.drive).sum((0, 2)).unsqueeze(1),
            torch.bmm(flat[0].transpose(1, 2), flat[1]),
        ]

    def grad_state(self) -> CortexState:
        return CortexState(*(self._by_lane(x) for x in (self.grad_v, self.grad_a, self.grad_s)))
