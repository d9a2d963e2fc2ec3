"""Drawing a token in buffers: `kernels.sample` without a new tensor, and with the same tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sample import Sampling
from kernels.sample.philox import _MASK, _MULTIPLIER_0, _MULTIPLIER_1, _NUM_ROUNDS, _WEYL_0, _WEYL_1
from neurogen.modes.preallocated.buffers import Room, constant

HALF = 0xFFFF


class PhiloxStep:
    """First word of Philox-4x32-10 at counters (id, position, lane, 0), `[B, V]`; see `kernels.sample.philox`."""

    def __init__(self, room: Room, vocab_size: int, seed: int) -> None:
        def make() -> Tensor:
            return room.buffer(room.lanes, vocab_size, dtype=torch.int64)

        self.counters = [make() for _ in range(4)]
        self.high, self.low, self.spare = [make(), make()], [make(), make()], make()
        self.ids = torch.arange(vocab_size, device=room.device)
        self.lanes = torch.arange(room.lanes, device=room.device).unsqueeze(-1)
        # A Python number in a bitwise operation becomes a tensor each time, so the constants are tensors once.
        key0, key1 = seed & _MASK, (seed >> 32) & _MASK
        keys = [((key0 + r * _WEYL_0) & _MASK, (key1 + r * _WEYL_1) & _MASK) for r in range(_NUM_ROUNDS)]
        self.keys = torch.tensor(keys).to(room.device, non_blocking=True)
        constants = [16, 32, HALF, _MASK]
        constants += [half for m in (_MULTIPLIER_0, _MULTIPLIER_1) for half in (m & HALF, m >> 16)]
        self.constants = torch.tensor(constants).to(room.device, non_blocking=True)

    def _multiply(self, x: Tensor, which: int) -> None:
        """High and low word of x times a multiplier, into `high[which]` and `low[which]`."""
        shift16, shift32, half, mask, *halves = self.constants.unbind()
        low, high, spare = self.low[which], self.high[which], self.spare
        torch.mul(x, halves[2 * which], out=low)
        torch.mul(x, halves[2 * which + 1], out=high)
        torch.bitwise_and(high, half, out=spare)
        torch.bitwise_left_shift(spare, shift16, out=spare)
        low.add_(spare)
        torch.bitwise_right_shift(high, shift16, out=high)
        torch.bitwise_right_shift(low, shift32, out=spare)
        high.add_(spare)
        torch.bitwise_and(high, mask, out=high)
        torch.bitwise_and(low, mask, out=low)

    def draw(self, positions: Tensor) -> Tensor:
        c0, c1, c2, c3 = self.counters
        for counter, value in zip(self.counters, (self.ids, positions.unsqueeze(-1), self.lanes)):
            counter.copy_(value)
        c3.zero_()
        for key in self.keys.unbind():
            key0, key1 = key.unbind()
            self._multiply(c0, 0)
            self._multiply(c2, 1)
            torch.bitwise_xor(self.high[1], c1, out=c0)
            torch.bitwise_xor(c0, key0, out=c0)
            torch.bitwise_xor(self.high[0], c3, out=c2)
            torch.bitwise_xor(c2, key1, out=c2)
            c1.copy_(self.low[1])
            c3.copy_(self.low[0])
        return c0


class SampleStep:
    """Logits `[B, V]` to tokens `[B]`, with the buffers of every filter the sampling uses.

    A top-p filter sorts, and torch.sort takes scratch memory of its own: the one thing here that allocates.
    """

    def __init__(self, room: Room, vocab_size: int, sampling: Sampling, seed: int) -> None:
        shape, self.sampling = (room.lanes, vocab_size), sampling
        self.raw, self.scores, self.work, self.other, self.draws = (
            room.buffer(*shape, dtype=torch.float32) for _ in range(5)
        )
        self.mask = room.buffer(*shape, dtype=torch.bool)
        self.threshold = room.buffer(room.lanes, 1, dtype=torch.float32)
        self.log_prob = room.buffer(room.lanes, 1, dtype=torch.float32)
        self.tokens = room.buffer(room.lanes, dtype=torch.int64)
        self.penalty, self.temperature, self.top_p = (
            constant(value, torch.float32)
            for value in (sampling.repetition_penalty, sampling.temperature, sampling.top_p)
        )
        self.zero, self.one, self.quarter, self.third, self.half, self.word, self.small = (
            constant(value, torch.float32) for value in (0.0, 1.0, 0.25, 1.0 / 3.0, 0.5, 2.0**-32, 1.0 / 64.0)
        )
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(shape, dtype=torch.bool, device=room.device)
        self.num_kept = sampling.top_k if 0 < sampling.top_k < vocab_size else 0
        if self.num_kept:
            self.top = room.buffer(room.lanes, self.num_kept, dtype=torch.float32)
            self.top_ids = room.buffer(room.lanes, self.num_kept, dtype=torch.int64)
        if sampling.top_p < 1:
            self.order = room.buffer(*shape, dtype=torch.int64)
            self.last = room.buffer(room.lanes, 1, dtype=torch.int64)
            self.one_place = torch.tensor(1)
        self.log_min_p = torch.log(torch.tensor(sampling.min_p))
        self.philox = PhiloxStep(room, vocab_size, seed) if sampling.temperature > 0 else None

    def number_lanes(self, lanes: Tensor) -> None:
        """Give lanes other numbers in their draws than 0 to B - 1; lanes `[B]` int64."""
        if self.philox is not None:
            self.philox.lanes.copy_(lanes.unsqueeze(-1))

    def draw(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[B]` and their log-probabilities `[B]`, in buffers the next draw overwrites."""
        raw, scores = self.raw, self.scores
        raw.copy_(logits)
        scores.copy_(raw)
        self._penalize()
        if self.philox is not None:
            scores.div_(self.temperature)
            self._filter()
            scores.sub_(self._log_exponentials(self.philox.draw(positions)))
        torch.argmax(scores, -1, out=self.tokens)
        torch.log_softmax(raw, -1, out=self.work)
        torch.gather(self.work, 1, self.tokens.unsqueeze(-1), out=self.log_prob)
        return self.tokens, self.log_prob[:, 0]

    def _penalize(self) -> None:
        if self.seen is None:
            return
        torch.div(self.scores, self.penalty, out=self.work)
        torch.mul(self.scores, self.penalty, out=self.other)
        torch.gt(self.scores, self.zero, out=self.mask)
        torch.where(self.mask, self.work, self.other, out=self.work)
        torch.where(self.seen, self.work, self.scores, out=self.scores)

    def _filter(self) -> None:
        if self.num_kept:
            torch.topk(self.scores, self.num_kept, out=(self.top, self.top_ids))
            self._drop_below(self.top[:, -1:])
        if self.sampling.top_p < 1:
            torch.sort(self.scores, dim=-1, descending=True, out=(self.work, self.order))
            torch.softmax(self.work, -1, out=self.draws)
            torch.cumsum(self.draws, -1, out=self.other)
            self.other.sub_(self.draws)
            torch.lt(self.other, self.top_p, out=self.mask)
            self.order.copy_(self.mask)
            torch.sum(self.order, -1, keepdim=True, out=self.last)
            torch.gather(self.work, -1, self.last.sub_(self.one_place), out=self.threshold)
            self._drop_below(self.threshold)
        if self.sampling.min_p > 0:
            torch.amax(self.scores, -1, keepdim=True, out=self.threshold)
            self._drop_below(self.threshold.add_(self.log_min_p))

    def _drop_below(self, threshold: Tensor) -> None:
        torch.lt(self.scores, threshold, out=self.mask)
        self.scores.masked_fill_(self.mask, float("-inf"))

    def _log_exponentials(self, words: Tensor) -> Tensor:
        """log of `kernels.sample.philox.exponential`, in the same order of operations."""
        w, series, exact = self.work, self.other, self.draws
        w.copy_(words).add_(self.half).mul_(self.word).clamp_max_(1.0 - 2.0**-24)
        torch.mul(w, self.quarter, out=series)
        for coefficient in (self.third, self.half, self.one):
            series.add_(coefficient).mul_(w)
        torch.neg(w, out=exact)
        exact.add_(self.one).log_().neg_()
        torch.lt(w, self.small, out=self.mask)
        torch.where(self.mask, series, exact, out=exact)
        return exact.log_()
