"""Lanes over documents in a new order each epoch, drawn from the seed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neurogen.data.batches import CarriedBatches, philox
from neurogen.data.stream import TokenStream
from neurogen.errors import UserError


class ShuffledLaneBatches(CarriedBatches):
    """Lanes through the documents in an order that seed and epoch decide.

    Epoch e orders the stream's files (shards) at random, and the documents within each: together a line of all N
    tokens. Lane b reads tokens [b*N/lanes, (b+1)*N/lanes) of the line of epoch 0, then the same range of the line of
    epoch 1, and so on: each epoch reads every token once. Where a lane enters an epoch it stands inside some document;
    there the state is reset, and that token is no target. A position is one number, so resuming is arithmetic.

    The order does not depend on ranks: rank r of W serves lanes [r*lanes/W, (r+1)*lanes/W).
    Raises UserError as `CarriedBatches`, and for a stream without document starts.
    """

    kind = "shuffled"

    def __init__(self, stream: TokenStream, **settings: Any) -> None:
        """Settings as keywords: lanes, window, seed=0, rank=0, world_size=1."""
        super().__init__(stream, **settings)
        if stream.document_start_id is None:
            raise UserError(f"the {stream.name} stream has no document starts to shuffle at; set data.shuffle=false")
        # Every lane may be inside a file of its own, and on its way into the next.
        self._orders = _Orders(stream.parts, self.seed, capacity=2 * len(self._rank_lanes))

    def _read_lane(self, lane: int, position: int, out: np.ndarray) -> list[int]:
        length = len(self.stream)
        start = lane * length // self.lanes
        size = (lane + 1) * length // self.lanes - start
        seams = []
        done = 0
        while done < len(out):
            epoch, offset = divmod(position + done, size)
            if offset == 0:
                seams.append(done)
            count = min(len(out) - done, size - offset)
            self._orders.read(epoch, start + offset, out[done : done + count])
            done += count
        return seams


@dataclass(frozen=True)
class _Line:
    """Documents in reading order: where each begins in its file, and in the line (one more, for the line's end)."""

    starts: np.ndarray
    ends: np.ndarray


class _Orders:
    """The lines of all epochs, worked out where they are read and forgotten when others are needed."""

    def __init__(self, parts: Sequence[TokenStream], seed: int, *, capacity: int) -> None:
        self._parts = parts
        self._tokens = [np.asarray(part.tokens) for part in parts]
        self._seed = seed
        self._capacity = capacity
        self._lines: OrderedDict[tuple[int, int], _Line] = OrderedDict()
        self._files: OrderedDict[int, _Line] = OrderedDict()

    def read(self, epoch: int, at: int, out: np.ndarray) -> None:
        """Fill `out` with what follows position `at` of the line of `epoch`."""
        files = self._file_order(epoch)
        index = int(np.searchsorted(files.ends, at, side="right")) - 1
        done = 0
        while done < len(out):
            part = int(files.starts[index])
            first = at + done - int(files.ends[index])
            count = min(len(out) - done, len(self._tokens[part]) - first)
            self._read_file(epoch, part, first, out[done : done + count])
            done += count
            index += 1

    def _read_file(self, epoch: int, part: int, at: int, out: np.ndarray) -> None:
        line, tokens = self._document_order(epoch, part), self._tokens[part]
        first = int(np.searchsorted(line.ends, at, side="right")) - 1
        last = int(np.searchsorted(line.ends, at + len(out), side="left"))
        begins = line.starts[first:last].tolist()
        stops = (line.starts[first:last] + np.diff(line.ends[first : last + 1])).tolist()
        begins[0] += at - int(line.ends[first])
        stops[-1] -= int(line.ends[last]) - (at + len(out))
        np.concatenate([tokens[begin:stop] for begin, stop in zip(begins, stops)], out=out)

    def _file_order(self, epoch: int) -> _Line:
        if epoch not in self._files:
            order = _permutation(len(self._parts), self._seed, epoch, 0)
            lengths = np.array([len(tokens) for tokens in self._tokens], dtype=np.int64)[order]
            self._files[epoch] = _Line(order, np.concatenate([[0], np.cumsum(lengths)]))
            _limit(self._files, 2)
        return self._files[epoch]

    def _document_order(self, epoch: int, part: int) -> _Line:
        key = (epoch, part)
        if key not in self._lines:
            offsets = np.append(np.asarray(self._parts[part].document_offsets), len(self._tokens[part]))
            order = _permutation(len(offsets) - 1, self._seed, epoch, part + 1)
            ends = np.concatenate([[0], np.cumsum(np.diff(offsets)[order])])
            self._lines[key] = _Line(offsets[order], ends)
            _limit(self._lines, self._capacity)
        self._lines.move_to_end(key)
        return self._lines[key]


def _permutation(count: int, seed: int, epoch: int, part: int) -> np.ndarray:
    """An order of `count` things: by a random number each. Raw words and a stable sort are the same everywhere."""
    return np.argsort(philox(seed, 0, count, stream=(part + 1, epoch)), kind="stable")


def _limit(cache: OrderedDict, capacity: int) -> None:
    while len(cache) > capacity:
        cache.popitem(last=False)
