"""The thalamus, a token at a time in buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.relay import NO_TOKEN
from kernels.segments import segment_index
from neurogen.brain.brain import Brain
from neurogen.modes.preallocated.buffers import Room, normalize, normalize_backward


class RelayStep:
    """x_t = sum_j w_j * rms(E[id_{t-j}]); see `kernels.relay`.

    Rows are kept in a ring: slot t + J - 1 holds token t's, the first J - 1 those of the ids carried in. A row of no
    token has scale 0, and so is zero and passes no gradient.
    """

    def __init__(self, room: Room, brain: Brain, embedding: Tensor) -> None:
        self.room, self.embedding, self.taps = room, embedding, brain.thalamus.taps
        self.num_taps, width = self.taps.shape
        self.means = room.mean(width, brain.config.norm_eps)
        self.num_rows = self.num_taps - 1 + room.num_tokens if room.saved else self.num_taps
        self.rows = room.buffer(self.num_rows, room.lanes, width)
        self.scales = room.buffer(self.num_rows, room.lanes, 1)
        self.gathered = room.buffer(room.lanes, width, dtype=embedding.dtype)
        self.row = self.gathered if embedding.dtype == room.dtype else room.buffer(room.lanes, width)
        self.scratch = room.buffer(room.lanes, width)
        self.gains = room.buffer(self.num_taps, room.lanes, width)
        self.tap_values = self.taps.detach().to(room.dtype)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.embedding, self.taps]

    def start(self, recent_ids: Tensor) -> None:
        """Gather the rows of the ids carried in, `[B, J-1]`."""
        self.recent_ids = recent_ids
        for j in range(self.num_taps - 1):
            self._gather(j, recent_ids[:, j].clamp_min(0))
            present = (recent_ids[:, j : j + 1] != NO_TOKEN).to(self.room.dtype)
            self.scales[j].mul_(present)
            self.rows[j].mul_(present)

    def start_documents(self, document_start: Tensor | None) -> None:
        """For a sequence with document starts, `[B, T]`: whether tap j of token t stays inside its document."""
        self.inside: Tensor | None = None
        if document_start is None:
            return
        num_tokens = document_start.shape[1]
        segment = segment_index(torch.nn.functional.pad(document_start, (self.num_taps - 1, 0))).t()
        now = segment[self.num_taps - 1 :]
        back = [segment[self.num_taps - 1 - j : self.num_taps - 1 - j + num_tokens] for j in range(self.num_taps)]
        self.inside = torch.stack([now == past for past in back], dim=1).to(self.room.dtype).unsqueeze(-1)

    def _gather(self, row: int, ids: Tensor) -> None:
        torch.index_select(self.embedding, 0, ids, out=self.gathered)
        if self.row is not self.gathered:
            self.row.copy_(self.gathered)
        normalize(self.row, self.rows[row], self.scales[row], self.scratch, self.means)

    def _gain(self, t: int, j: int) -> Tensor:
        """w_j where tap j of token t stays inside its document, else 0."""
        if self.inside is None:
            return self.tap_values[j]
        return torch.mul(self.tap_values[j], self.inside[t, j], out=self.gains[j])

    def forward(self, t: int, ids: Tensor, x: Tensor) -> None:
        """Write token t of every lane, ids `[B]`, to the workspace x `[B, D]`."""
        now = t + self.num_taps - 1
        self._gather(now % self.num_rows, ids)
        torch.mul(self.rows[now % self.num_rows], self._gain(t, 0), out=x)
        for j in range(1, self.num_taps):
            x.addcmul_(self.rows[(now - j) % self.num_rows], self._gain(t, j))

    def prepare_backward(self) -> None:
        self.grad_rows = torch.zeros_like(self.rows)
        self.grad_x = torch.empty_like(self.rows[self.num_taps - 1 :])
        self.sums = torch.empty_like(self.scales[0])

    def backward(self, t: int, grad_x: Tensor) -> None:
        now = t + self.num_taps - 1
        self.grad_x[t].copy_(grad_x)
        for j in range(self.num_taps):
            self.grad_rows[now - j].addcmul_(grad_x, self._gain(t, j))
        self._row_backward(now)

    def _row_backward(self, row: int) -> None:
        grad = self.grad_rows[row]
        normalize_backward(grad, self.rows[row], self.scales[row], self.scratch, self.sums, self.means, out=grad)

    def gradients(self, input_ids: Tensor) -> list[Tensor]:
        for row in range(self.num_taps - 1):
            self._row_backward(row)
        ids = torch.cat([self.recent_ids, input_ids], dim=1).t().clamp_min(0)
        grad_embedding = torch.zeros(self.embedding.shape, dtype=self.room.dtype, device=self.room.device)
        # Sorted, and so deterministic, on a GPU too, where index_add_ would add in any order.
        grad_embedding.index_put_((ids,), self.grad_rows, accumulate=True)
        num_tokens = self.grad_x.shape[0]
        grad_taps = []
        for j in range(self.num_taps):
            back = self.rows[self.num_taps - 1 - j : self.num_taps - 1 - j + num_tokens]
            inside = 1.0 if self.inside is None else self.inside[:, j]
            grad_taps.append((self.grad_x * back * inside).sum((0, 1)))
        return [grad_embedding.to(self.embedding.dtype), torch.stack(grad_taps).to(self.taps.dtype)]


def carried_ids(input_ids: Tensor, recent_ids: Tensor, document_start: Tensor | None) -> Tensor:
    """The last ids of the current document after a sequence, `[B, J-1]`, NO_TOKEN where there is none."""
    num_recent = recent_ids.shape[1]
    last = torch.cat([recent_ids, input_ids], dim=1)[:, input_ids.shape[1] :]
    if document_start is None:
        return last
    segment = segment_index(torch.nn.functional.pad(document_start, (num_recent, 0)))
    same_document = segment[:, -num_recent:] == segment[:, -1:]
    return torch.where(same_document, last, NO_TOKEN)
