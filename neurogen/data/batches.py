"""From a token stream to batches [B, T]: lanes that carry on, independent windows, and one pass for evaluation.

Which tokens a batch holds is arithmetic on stream, lanes, window, seed and position: to resume, set the position.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from neurogen.data.config import DataConfig
from neurogen.data.stream import TokenStream
from neurogen.errors import UserError

IGNORE = -100


@dataclass
class Batch:
    """One step's worth of tokens.

    input_ids: int64 [B, T].
    target_ids: int64 [B, T], the token after each input, -100 where there is none.
    document_start: bool [B, T], True where the state is to be reset before reading the input.
    """

    input_ids: torch.Tensor
    target_ids: torch.Tensor
    document_start: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return Batch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.target_ids.to(device, non_blocking=non_blocking),
            self.document_start.to(device, non_blocking=non_blocking),
        )


class _Batches:
    """What lanes and random windows share: the shape, the share of a rank, the position, and a stop at bad settings."""

    kind: str

    def __init__(
        self, stream: TokenStream, *, lanes: int, window: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        _check_shape(lanes, window, rank, world_size)
        self.stream = stream
        self.lanes = lanes
        self.window = window
        self.seed = seed
        self._lane_slice = _rank_lanes(lanes, rank, world_size)

    def __iter__(self):
        return self

    def _identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "stream": self.stream.fingerprint, "seed": self.seed, "lanes": self.lanes}

    def _check_identity(self, state: dict[str, Any], identity: dict[str, Any]) -> None:
        for key, value in identity.items():
            if state.get(key) != value:
                raise UserError(
                    f"the saved data position has {key}={state.get(key)!r}, this run {value!r}; make them agree"
                )


class LaneBatches(_Batches):
    """Endless windows in lanes: lane b reads on where it stopped, so the model's state may be carried across windows.

    The stream is a ring of N tokens. `seed` turns it by a random amount; lane b starts at b*N/lanes from there and
    after N/lanes tokens moves on into the next lane's part, so no token is left out and an epoch (N tokens over all
    lanes) has no seam. The one seam is the ring's own: the last token's target is the stream's first token, and there
    the state is reset (document_start is True at position 0 of the stream, as it is at every document-start id).

    lanes counts all ranks together; rank r of W serves lanes [r*lanes/W, (r+1)*lanes/W), the same for any W.
    Raises UserError when lanes or window are below 1, lanes do not divide by world_size, or the stream has fewer than
    lanes * window tokens.
    """

    kind = "lanes"

    def __init__(self, stream: TokenStream, **settings: Any) -> None:
        """Settings as keywords: lanes, window, seed=0, rank=0, world_size=1."""
        super().__init__(stream, **settings)
        length = len(stream)
        if length < self.lanes * self.window:
            raise UserError(
                f"the {stream.name} stream has {length} tokens, but {self.lanes} lanes of window {self.window} need "
                f"{self.lanes * self.window}; lower data.lanes or data.window, or give more text"
            )
        turn = int(_raw(self.seed, 0, 1)[0]) % length
        self._starts = [(turn + lane * length // self.lanes) % length for lane in range(self.lanes)][self._lane_slice]
        self.position = 0  # tokens each lane has read

    @property
    def epoch(self) -> int:
        """How many times the whole stream has been read."""
        return self.position * self.lanes // len(self.stream)

    def window_at(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B, T+1] in the stream's own type and reset marks bool [B, T], once lanes have read `position` tokens."""
        tokens, span = self.stream.tokens, self.window + 1
        length = len(tokens)
        ids = np.empty((len(self._starts), span), dtype=tokens.dtype)
        seams = []
        for row, start in enumerate(self._starts):
            first = (start + position) % length
            if first + span <= length:
                ids[row] = tokens[first : first + span]
            else:
                ids[row] = np.take(tokens, np.arange(first, first + span), mode="wrap")
            if first == 0 or first + span > length:
                seams.append((row, (-first) % length))
        resets = _document_starts(ids, self.stream)
        for row, column in seams:
            resets[row, column::length] = True
        return ids, resets

    def __next__(self) -> Batch:
        batch = _batch(*self.window_at(self.position))
        self.position += self.window
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position and what it refers to, JSON-able."""
        return {**self._identity(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there. The window and the number of ranks may differ; UserError when anything else does."""
        self._check_identity(state, self._identity())
        self.position = int(state["position"])


class RandomBatches(_Batches):
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
        """Ids [B, T+1] in the stream's own type, and reset marks bool [B, T], of a step."""
        # Raw words, since numpy may change its higher-level draws between versions.
        unit = (_raw(self.seed, step + 1, self.lanes) >> np.uint64(11)) * 2.0**-53
        starts = np.minimum((unit * self._choices).astype(np.int64), self._choices - 1)[self._lane_slice]
        ids = np.stack([self.stream.tokens[start : start + self.window + 1] for start in starts.tolist()])
        resets = _document_starts(ids, self.stream)
        resets[:, 0] = True
        return ids, resets

    def __next__(self) -> Batch:
        batch = _batch(*self.window_at(self.step))
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The step and what it refers to, JSON-able."""
        return {**self._identity(), "window": self.window, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there. The number of ranks may differ; UserError when anything else does."""
        self._check_identity(state, {**self._identity(), "window": self.window})
        self.step = int(state["step"])


def make_batches(
    stream: TokenStream, config: DataConfig, *, seed: int, rank: int = 0, world_size: int = 1
) -> LaneBatches | RandomBatches:
    """The batches that `config` asks for (batching, lanes, window) from `stream`."""
    kind = LaneBatches if config.batching == "lanes" else RandomBatches
    return kind(stream, lanes=config.lanes, window=config.window, seed=seed, rank=rank, world_size=world_size)


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
    for offset in range(0, longest, window):
        ids = np.zeros((len(parts), window + 1), dtype=np.int64)
        num_valid = np.zeros((len(parts), 1), dtype=np.int64)
        resets = np.zeros((len(parts), window), dtype=bool)
        for row, (start, end) in enumerate(parts):
            first = start + offset
            count = min(window, end - first)
            if count > 0:
                ids[row, : count + 1] = stream.tokens[first : first + count + 1]
                num_valid[row] = count
                resets[row, 0] = first == 0
        resets |= _document_starts(ids, stream)
        valid = np.arange(window) < num_valid
        batch = _batch(ids, resets & valid)
        mask = torch.from_numpy(valid)
        batch.input_ids.masked_fill_(~mask, 0)
        batch.target_ids.masked_fill_(~mask, IGNORE)
        yield batch


def _batch(ids: np.ndarray, resets: np.ndarray) -> Batch:
    return Batch(
        torch.from_numpy(ids[:, :-1].astype(np.int64)),
        torch.from_numpy(ids[:, 1:].astype(np.int64)),
        torch.from_numpy(resets),
    )


def _document_starts(ids: np.ndarray, stream: TokenStream) -> np.ndarray:
    if stream.document_start_id is None:
        return np.zeros((ids.shape[0], ids.shape[1] - 1), dtype=bool)
    return ids[:, :-1] == stream.document_start_id


def _raw(seed: int, counter: int, count: int) -> np.ndarray:
    """`count` raw 64-bit words of Philox4x64. The counter fills the top word, so different counters never overlap."""
    return np.random.Philox(key=seed % 2**64, counter=[0, 0, 0, counter]).random_raw(count)


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
