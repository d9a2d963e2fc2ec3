"""Decoder and cross-entropy, a token at a time in buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.decode import IGNORE_INDEX, DecodeOutput
from kernels.precision import accumulation_dtype, no_autocast
from neurogen.brain import Decoder
from neurogen.modes.preallocated.buffers import Norm, Projection, Room
from neurogen.probes import stage


class _TokenLosses:
    """Decoder and loss over time-major tokens; see `kernels.decode`."""

    def __init__(self, room: Room, weight: Tensor, eps: float, target_ids: Tensor) -> None:
        self.norm = Norm(room, weight.shape[1], eps)
        self.proj = Projection(room, weight)
        self.log_probs = room.tape(room.lanes, weight.shape[0])
        self.targets = target_ids.t().clamp_min(0).contiguous().unsqueeze(-1)
        self.counted = (target_ids.t() != IGNORE_INDEX).to(room.dtype)
        self.likelihood, self.hits = room.buffer(room.lanes, 1), room.buffer(room.lanes)
        self.best = room.buffer(room.lanes, dtype=torch.int64)
        self.is_hit = room.buffer(room.lanes, dtype=torch.bool)
        self.total, self.num_correct = room.buffer(room.lanes), room.buffer(room.lanes)
        self.minus_one = torch.full((room.lanes, 1), -1.0, dtype=room.dtype, device=room.device)

    def forward(self, broca_output: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss and number of hits, for Broca's output `[T, B, D]`."""
        self.total.zero_()
        self.num_correct.zero_()
        for t in range(broca_output.shape[0]):
            i = t % max(self.log_probs.shape[0], 1)
            log_probs = self.log_probs[i]
            self.proj.input(i).copy_(self.norm.forward(i, broca_output[t]))
            log_probs.copy_(self.proj.forward(i))
            torch.argmax(log_probs, -1, out=self.best)
            torch.log_softmax(log_probs, -1, out=log_probs)
            torch.gather(log_probs, 1, self.targets[t], out=self.likelihood)
            self.total.addcmul_(self.likelihood[:, 0], self.counted[t], value=-1.0)
            torch.eq(self.best, self.targets[t, :, 0], out=self.is_hit)
            self.num_correct.addcmul_(self.hits.copy_(self.is_hit), self.counted[t])
        return self.total.sum(), self.num_correct.sum().to(torch.int64)

    def backward(self, broca_output: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of scale * the summed loss at Broca's output and at the weight."""
        self.proj.prepare_backward()
        grad_output = torch.zeros_like(broca_output)
        weights = (self.counted * scale).unsqueeze(-1)
        grad_logits = self.log_probs.new_empty(self.log_probs.shape[1:])
        for t in range(broca_output.shape[0]):
            torch.exp(self.log_probs[t], out=grad_logits)
            grad_logits.scatter_add_(1, self.targets[t], self.minus_one).mul_(weights[t])
            self.proj.grad_output(t).copy_(grad_logits)
            self.norm.backward(t, self.proj.backward(t), grad_output[t])
        return grad_output, self.proj.gradients()[0]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: _TokenLosses, broca_output: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.losses = losses
        ctx.save_for_backward(broca_output, weight)
        total, num_correct = losses.forward(broca_output)
        ctx.mark_non_differentiable(num_correct)
        return total, num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[None, Tensor, Tensor]:
        broca_output, _ = ctx.saved_tensors
        grad_output, grad_weight = ctx.losses.backward(broca_output, grad)
        return None, grad_output, grad_weight


def sequence_loss(decoder: Decoder, broca_output: Tensor, target_ids: Tensor) -> DecodeOutput:
    """Loss and accuracy of `[B, T, D]` against targets `[B, T]`; see `Decoder.loss`."""
    lanes, num_tokens = target_ids.shape
    device, dtype = broca_output.device, accumulation_dtype(broca_output, decoder.weight)
    autocast = torch.is_autocast_enabled(device.type) and dtype == torch.float32
    weight = decoder.weight.to(torch.get_autocast_dtype(device.type)) if autocast else decoder.weight
    saved = torch.is_grad_enabled() and (broca_output.requires_grad or weight.requires_grad)
    room = Room(lanes, num_tokens, saved, device, dtype, weight.dtype)
    with stage("decode"), no_autocast(broca_output):
        losses = _TokenLosses(room, weight, decoder.eps, target_ids)
        by_token = broca_output.transpose(0, 1).to(dtype)
        if saved:
            total, num_correct = _Loss.apply(losses, by_token, weight)
        else:
            with torch.no_grad():
                total, num_correct = losses.forward(by_token)
        num_targets = (target_ids != IGNORE_INDEX).sum()
        return DecodeOutput(total / num_targets.clamp_min(1), num_correct, num_targets)
