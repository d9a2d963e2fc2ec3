"""A memory layer's token shift, a token at a time in buffers, and its reverse pass."""

from __future__ import annotations

import torch
from torch import Tensor

from neurogen.brain.token_shift import TokenShift
from neurogen.modes.preallocated.buffers import Room


class TokenShiftStep:
    """`neurogen.brain.token_shift` for one token: y = sum_j w_j h_{t-j}, rows `[B, D]`, those before it carried."""

    def __init__(self, room: Room, shift: TokenShift) -> None:
        self.room = room
        self.taps = shift.taps.to(room.dtype)
        num_taps, width = shift.taps.shape
        self.rows = room.tape(room.lanes, width)
        self.recent = room.state_tape(room.lanes, num_taps - 1, width)
        self.scratch = room.buffer(room.lanes, width)

    def start(self, recent: Tensor) -> None:
        self.recent[0].copy_(recent)

    def _slots(self, t: int) -> tuple[int, int, int]:
        num_slots = self.recent.shape[0]
        return t % self.rows.shape[0], t % num_slots, (t + 1) % num_slots

    def forward(self, t: int, h: Tensor, kept: Tensor | None, out: Tensor) -> None:
        """Write token t's mixture of h and the rows before it to `out`, `[B, D]` each."""
        i, before, after = self._slots(t)
        recent = self.recent[before]
        if kept is not None:
            # From here on the slot holds the rows after the reset, as the reverse pass wants them.
            recent.mul_(kept.view(-1, 1, 1))
        self.rows[i].copy_(h)
        torch.mul(h, self.taps[0], out=out)
        for lag in range(1, len(self.taps)):
            out.addcmul_(self.taps[lag], recent[:, -lag])
        self.recent[after][:, :-1].copy_(recent[:, 1:])
        self.recent[after][:, -1].copy_(h)

    def prepare_backward(self, grad_recent: Tensor) -> None:
        self.grad_taps = torch.zeros_like(self.taps)
        self.grad_recent = grad_recent.to(self.room.dtype, copy=True)
        self.moved = torch.empty_like(self.grad_recent)
        self.sums = self.taps.new_empty(self.taps.shape[1])

    def backward(self, t: int, grad: Tensor, kept: Tensor | None, out: Tensor) -> None:
        """Token t in reverse: from the gradient at the mixture to that at h, written to `out`."""
        i, before, _ = self._slots(t)
        recent = self.recent[before]
        self._add_taps(0, grad, self.rows[i])
        torch.mul(grad, self.taps[0], out=out)
        out.add_(self.grad_recent[:, -1])
        # Row m of the state after is row m + 1 of the one before, whose first row is forgotten.
        self.moved[:, 1:].copy_(self.grad_recent[:, :-1])
        self.moved[:, 0].zero_()
        for lag in range(1, len(self.taps)):
            self.moved[:, -lag].addcmul_(grad, self.taps[lag])
            self._add_taps(lag, grad, recent[:, -lag])
        if kept is not None:
            self.moved.mul_(kept.view(-1, 1, 1))
        self.grad_recent.copy_(self.moved)

    def _add_taps(self, lag: int, grad: Tensor, row: Tensor) -> None:
        torch.mul(grad, row, out=self.scratch)
        torch.sum(self.scratch, 0, out=self.sums)
        self.grad_taps[lag].add_(self.sums)
