"""SwiGLU and the basal ganglia's gates, a token at a time in buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from neurogen.brain.regions import BasalGanglia, SwiGLU
from neurogen.modes.preallocated.buffers import Norm, Projection, Room, sigmoid_backward, silu, silu_backward


class SwiGLUStep:
    """x += W_out (silu(g) * u) with [g, u] = W_in rms(x)."""

    def __init__(self, room: Room, mlp: SwiGLU, eps: float) -> None:
        self.norm = Norm(room, mlp.in_proj.in_features, eps)
        self.in_proj = Projection(room, mlp.in_proj.weight.to(room.matmul_dtype))
        self.out_proj = Projection(room, mlp.out_proj.weight.to(room.matmul_dtype))
        self.gate = room.buffer(room.lanes, mlp.out_proj.in_features)

    @property
    def inputs(self) -> list[Tensor]:
        return [*self.in_proj.inputs, *self.out_proj.inputs]

    def forward(self, i: int, x: Tensor) -> None:
        self.in_proj.input(i).copy_(self.norm.forward(i, x))
        gate, value = self.in_proj.forward(i).chunk(2, dim=-1)
        silu(gate, out=self.gate)
        torch.mul(self.gate, value, out=self.out_proj.input(i))
        x.add_(self.out_proj.forward(i))

    def prepare_backward(self) -> None:
        self.in_proj.prepare_backward()
        self.out_proj.prepare_backward()

    def backward(self, i: int, grad_x: Tensor) -> None:
        self.out_proj.grad_output(i).copy_(grad_x)
        grad = self.out_proj.backward(i)
        gate, value = self.in_proj.output[i].chunk(2, dim=-1)
        grad_gate, grad_value = self.in_proj.grad_output(i).chunk(2, dim=-1)
        silu(gate, out=self.gate)
        torch.mul(grad, self.gate, out=grad_value)
        grad.mul_(value)
        silu_backward(grad, gate, grad_input=grad_gate)
        self.norm.backward(i, self.in_proj.backward(i), grad_x)

    def gradients(self) -> list[Tensor]:
        return [*self.in_proj.gradients(), *self.out_proj.gradients()]


class GoStep:
    """g = sigmoid(W rms(x) + b), `[B, K]`."""

    def __init__(self, room: Room, gates: BasalGanglia) -> None:
        self.norm = Norm(room, gates.go.in_features, gates.eps)
        self.proj = Projection(room, gates.go.weight, gates.go.bias)
        self.go = room.tape(room.lanes, gates.go.out_features)

    @property
    def inputs(self) -> list[Tensor]:
        return self.proj.inputs

    def forward(self, i: int, x: Tensor) -> Tensor:
        self.proj.input(i).copy_(self.norm.forward(i, x))
        return torch.sigmoid(self.proj.forward(i), out=self.go[i])

    def prepare_backward(self) -> None:
        self.proj.prepare_backward()

    def backward(self, i: int, grad_go: Tensor, grad_x: Tensor) -> None:
        sigmoid_backward(grad_go, self.go[i], grad_input=self.proj.grad_output(i))
        self.norm.backward(i, self.proj.backward(i), grad_x)

    def gradients(self) -> list[Tensor]:
        return self.proj.gradients()
