"""From a token stream to batches [B, T]: lanes that carry on, independent windows, and one pass for evaluation.

Which tokens a batch holds is arithmetic on stream, lanes, window, seed and position: to resume, set the position.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from neurogen.data.stream import TokenStream, windows_of
from neurogen.errors import UserError

IGNORE = -100
BLOCK_TOKENS = 1 << 14


@dataclass
class Batch:
    """One step's worth of tokens.

    input_ids: int64 [B, T].
    target_ids: int64 [B, T], the token after each input, -100 where there is none.
    document_start: bool [B, T], True where the state is to be reset before reading the input.
    num_targets: int64 [B], how many targets of each lane are not -100, counted on the host: asking a GPU would make the
        host wait for it. None where nobody counted.
    """

    input_ids: torch.Tensor
    target_ids: torch.Tensor
    document_start: torch.Tensor
    num_targets: np.ndarray | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return Batch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.target_ids.to(device, non_blocking=non_blocking),
            self.document_start.to(device, non_blocking=non_blocking),
            self.num_targets,
        )


class Batches:
    """What all endless batches share: the shape, the share of a rank, and a stop at bad settings.

    window_at(position) is a pure function: ids [B, T+1] in the stream's own type and resets bool [B, T+1], both only
    valid until the next call. `next` turns them into a `Batch`.
    """

    kind: str

    def __init__(
        self,
        stream: TokenStream,
        *,
        lanes: int,
        window: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        only: Sequence[int] | None = None,
    ) -> None:
        """`only` names the lanes to serve, instead of the share of `rank`."""
        _check_shape(lanes, window, rank, world_size)
        self.stream = stream
        self.lanes = lanes
        self.window = window
        self.seed = seed
        self._rank_lanes = range(lanes)[_rank_lanes(lanes, rank, world_size)] if only is None else only

    @property
    def epoch(self) -> int:
        """How many times as many tokens as the stream has were served."""
        raise NotImplementedError

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        return host_batch(*self.next_window(), self.stream.document_start_id)

    def next_window(self) -> tuple[np.ndarray, np.ndarray]:
        """The next batch as `expand` takes it; moves the position."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The position and what it refers to, JSON-able."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there. The number of ranks may differ; UserError when stream, seed or lanes do."""
        raise NotImplementedError

    def _identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "stream": self.stream.fingerprint, "seed": self.seed, "lanes": self.lanes}

    def _check_identity(self, state: dict[str, Any], identity: dict[str, Any]) -> None:
        for key, value in identity.items():
            if state.get(key) != value:
                raise UserError(
                    f"the saved data position has {key}={state.get(key)!r}, this run {value!r}; make them agree"
                )


class CarriedBatches(Batches):
    """Endless windows in lanes: lane b reads on where it stopped, so the model's state may be carried across windows.

    Raises UserError when lanes or window are below 1, lanes do not divide by world_size, or the stream has fewer than
    lanes * window tokens. A subclass says what a lane reads, by `_read_lane`.
    """

    def __init__(self, stream: TokenStream, **settings: Any) -> None:
        """Settings as keywords: lanes, window, seed=0, rank=0, world_size=1."""
        super().__init__(stream, **settings)
        if len(stream) < self.lanes * self.window:
            raise UserError(
                f"the {stream.name} stream has {len(stream)} tokens, but {self.lanes} lanes of window {self.window} "
                f"need {self.lanes * self.window}; lower data.lanes or data.window, or give more text"
            )
        self.position = 0  # tokens each lane has read
        longest = min(BLOCK_TOKENS, len(self.stream) // self.lanes)
        shape = (len(self._rank_lanes), max(1, longest // self.window) * self.window + 1)
        # Filled again and again: fresh memory for every block would cost more than what is copied into it.
        self._ids, self._resets = np.empty(shape, self.stream.tokens.dtype), np.empty(shape, dtype=bool)
        self._block_position: int | None = None

    @property
    def epoch(self) -> int:
        """How many times as many tokens as the stream has were read."""
        return self.position * self.lanes // len(self.stream)

    def window_at(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and resets [B, T+1] once each lane has read `position` tokens."""
        # Lanes are read a block of windows at a time: the cost in Python is per lane and document, not per window.
        last = self._ids.shape[1] - self.window - 1
        if self._block_position is None or not 0 <= position - self._block_position <= last:
            self._block_position = None  # nobody's, until it is whole
            self._read_block(position)
            self._block_position = position
        first = position - self._block_position
        columns = slice(first, first + self.window + 1)
        return self._ids[:, columns], self._resets[:, columns]

    def next_window(self) -> tuple[np.ndarray, np.ndarray]:
        window = self.window_at(self.position)
        self.position += self.window
        return window

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there. Window and number of ranks may differ; UserError when stream, seed or lanes do."""
        self._check_identity(state, self._identity())
        self.position = int(state["position"])

    def _read_block(self, position: int) -> None:
        start_id = self.stream.document_start_id
        for row, lane in enumerate(self._rank_lanes):
            ids, resets = self._ids[row], self._resets[row]
            seams = self._read_lane(lane, position, ids)
            # Row by row, so that the ids are still in the processor's cache.
            if start_id is None:
                resets.fill(False)
            else:
                np.equal(ids, start_id, out=resets)
            resets[seams] = True

    def _read_lane(self, lane: int, position: int, out: np.ndarray) -> list[int]:
        """Fill `out` with what `lane` reads from its `position` on. Returns where in it the text does not carry on."""
        raise NotImplementedError


class LaneBatches(CarriedBatches):
    """Lanes through the stream in its own order.

    The stream is a ring of N tokens. `seed` turns it by a random amount; lane b starts at b*N/lanes from there and
    after N/lanes tokens moves on into the next lane's part, so no token is left out and an epoch (N tokens over all
    lanes) has no seam. The one seam is the ring's own, at position 0 of the stream: there the state is reset
    (document_start is True, as it is at every document-start id), and what comes after the stream's last token is
    no target unless it is a document-start id.

    lanes counts all ranks together; rank r of W serves lanes [r*lanes/W, (r+1)*lanes/W), the same for any W.
    """

    kind = "lanes"

    def _read_lane(self, lane: int, position: int, out: np.ndarray) -> list[int]:
        tokens, length = self.stream.tokens, len(self.stream)
        turn = int(philox(self.seed, 0, 1)[0]) % length
        at = (turn + lane * length // self.lanes + position) % length
        seams = list(range((-at) % length, len(out), length))
        done = 0
        while done < len(out):
            run = tokens[at : at + len(out) - done]
            out[done : done + len(run)] = run
            done += len(run)
            at = 0
        return seams


class RandomBatches(Batches):
    """Endless independent windows; those of a step are a pure function of (seed, step): Philox, keyed by the seed.

    A window may cross document starts. Each begins with document_start True, since no state precedes it.
    Ranks share out the lanes of a step as `LaneBatches` does. Raises UserError as `LaneBatches`, for a stream of
    fewer than window + 1 tokens.
    """

    kind = "random"

    def __init__(self, stream: TokenStream, **settings: Any) -> None:
        """Settings as keywords: lanes, window, seed=0, rank=0, world_size=1."""
        super().__init__(stream, **settings)
        self._choices = len(stream) - self.window
        if self._choices < 1:
            raise UserError(
                f"the {stream.name} stream has {len(stream)} tokens, but a window of {self.window} needs "
                f"{self.window + 1}; lower data.window or give more text"
            )
        self.step = 0

    @property
    def epoch(self) -> int:
        """How many times as many tokens as the stream has were drawn."""
        return self.step * self.lanes * self.window // len(self.stream)

    def window_at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and resets [B, T+1] of a step."""
        # Raw words, since numpy may change its higher-level draws between versions.
        unit = (philox(self.seed, step + 1, self.lanes) >> np.uint64(11)) * 2.0**-53
        starts = np.minimum((unit * self._choices).astype(np.int64), self._choices - 1)
        ids = windows_of(self.stream.tokens, starts[self._rank_lanes], self.window + 1)
        start_id = self.stream.document_start_id
        resets = np.zeros(ids.shape, dtype=bool) if start_id is None else ids == start_id
        resets[:, 0] = True
        return ids, resets

    def next_window(self) -> tuple[np.ndarray, np.ndarray]:
        window = self.window_at(self.step)
        self.step += 1
        return window

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "window": self.window, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there. The number of ranks may differ; UserError when anything else does."""
        self._check_identity(state, {**self._identity(), "window": self.window})
        self.step = int(state["step"])


def expand(ids: torch.Tensor, resets: torch.Tensor, document_start_id: int | None) -> Batch:
    """A `Batch` from ids [B, T+1] of any integer type and resets bool [B, T+1], on the device they are on.

    Where the text does not carry on, and what follows is no document start, there is nothing to predict: target -100.
    """
    ids = ids.to(torch.int64)
    target_ids = ids[:, 1:]
    foreign = resets[:, 1:] & (target_ids != (-1 if document_start_id is None else document_start_id))
    return Batch(ids[:, :-1].contiguous(), target_ids.masked_fill(foreign, IGNORE), resets[:, :-1].contiguous())


def host_batch(ids: np.ndarray, resets: np.ndarray, document_start_id: int | None) -> Batch:
    """What `expand` makes of a window, in memory of its own and with its targets counted.

    numpy needs a third of the time that torch takes for arrays of this size.
    """
    lanes, window = ids.shape[0], ids.shape[1] - 1
    input_ids, target_ids = np.empty((lanes, window), np.int64), np.empty((lanes, window), np.int64)
    input_ids[...] = ids[:, :-1]
    target_ids[...] = ids[:, 1:]
    foreign = foreign_targets(ids, resets, document_start_id)
    if foreign is not None:
        target_ids[foreign] = IGNORE
    starts = torch.from_numpy(resets[:, :-1].copy())
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(target_ids), starts, count_targets(ids, foreign))


def foreign_targets(ids: np.ndarray, resets: np.ndarray, document_start_id: int | None) -> np.ndarray | None:
    """bool [B, T]: where the text does not carry on and what follows is no document start. None where that is nowhere,
    as in most windows."""
    foreign = resets[:, 1:] if document_start_id is None else resets[:, 1:] & (ids[:, 1:] != document_start_id)
    return foreign if foreign.any() else None


def count_targets(ids: np.ndarray, foreign: np.ndarray | None) -> np.ndarray:
    """int64 [B]: how many targets each lane is left with."""
    counts = np.full(len(ids), ids.shape[1] - 1, np.int64)
    return counts if foreign is None else counts - foreign.sum(axis=1)


def validation_batches(
    stream: TokenStream, *, lanes: int, window: int, max_tokens: int | None = None, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """One pass in lanes over the first `max_tokens` targets (default all): each token but the first is a target once.

    Lane b reads its own contiguous part from window to window, as in training. Where a lane's part has ended, inputs
    are 0 and targets -100. All ranks get the same number of batches. Raises UserError, at the call, for settings below
    1 or a stream of fewer than two tokens.
    """
    _check_shape(lanes, window, rank, world_size)
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"the number of validation tokens is {max_tokens}; it must be at least 1, or null for all")
    if len(stream) < 2:
        raise UserError(f"the {stream.name} stream has {len(stream)} tokens; evaluation needs at least 2")
    num_targets = len(stream) - 1 if max_tokens is None else min(max_tokens, len(stream) - 1)
    bounds = [lane * num_targets // lanes for lane in range(lanes + 1)]
    parts = list(itertools.pairwise(bounds))
    longest = max(end - start for start, end in parts)
    return _validation_pass(stream, parts[_rank_lanes(lanes, rank, world_size)], window, longest)


def _validation_pass(stream: TokenStream, parts: list[tuple[int, int]], window: int, longest: int) -> Iterator[Batch]:
    start_id = -1 if stream.document_start_id is None else stream.document_start_id
    for offset in range(0, longest, window):
        inputs = np.zeros((len(parts), window), dtype=np.int64)
        targets = np.full((len(parts), window), IGNORE, dtype=np.int64)
        resets = np.zeros((len(parts), window), dtype=bool)
        for row, (start, end) in enumerate(parts):
            first = start + offset
            count = min(window, end - first)
            if count > 0:
                ids = stream.tokens[first : first + count + 1]
                inputs[row, :count] = ids[:-1]
                targets[row, :count] = ids[1:]
                resets[row, :count] = inputs[row, :count] == start_id
                resets[row, 0] |= first == 0
        counts = (targets != IGNORE).sum(axis=1)
        yield Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(resets), counts)


def philox(seed: int, counter: int, count: int, *, stream: tuple[int, int] = (0, 0)) -> np.ndarray:
    """`count` raw 64-bit words of Philox4x64, the same on every machine.

    `stream` and `counter` fill the upper words of the generator's counter, so draws that differ in one never overlap.
    """
    return np.random.Philox(key=seed % 2**64, counter=[0, *stream, counter]).random_raw(count)


def _rank_lanes(lanes: int, rank: int, world_size: int) -> slice:
    share = lanes // world_size
    return slice(rank * share, (rank + 1) * share)


def _check_shape(lanes: int, window: int, rank: int, world_size: int) -> None:
    for key, value in (("lanes", lanes), ("window", window)):
        if value < 1:
            raise UserError(f"data.{key} is {value}; it must be at least 1")
    if lanes % world_size:
        raise UserError(f"data.lanes is {lanes}, which does not divide by {world_size} ranks")
    assert 0 <= rank < world_size, (rank, world_size)
