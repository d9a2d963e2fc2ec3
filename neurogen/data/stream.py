"""A token stream on disk: ids of one width in a flat file, mapped into memory, and where each document starts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from neurogen.errors import UserError

DTYPES: dict[str, Any] = {"uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32}


def dtype_for(max_id: int) -> str:
    """Name of the narrowest unsigned type that holds `max_id`."""
    return next(name for name, dtype in DTYPES.items() if max_id <= np.iinfo(dtype).max)


@dataclass(frozen=True)
class TokenStream:
    """Token ids of one part of a corpus, in reading order.

    tokens: [N] uint8, uint16 or uint32, usually a read-only memory map.
    document_offsets: int64 [number of documents], the position of each document's first id.
    document_start_id: the id that starts documents in this stream, or None where a separator joins them.
    fingerprint: sha256, in hex, of the ids.
    name: what errors call it.
    """

    tokens: np.ndarray
    document_offsets: np.ndarray
    document_start_id: int | None
    fingerprint: str
    name: str = "stream"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def parts(self) -> Sequence[TokenStream]:
        """The stream as streams of whole documents, each in one file, in order."""
        return (self,)


class StreamWriter:
    """Writes `<name>.bin` and `<name>.offsets` in `directory`, little-endian, without holding the stream in memory.

    after: an entry that `sync` returned, to carry on from there; what was written later is cut off.
    """

    def __init__(self, directory: Path, name: str, *, dtype: str, after: dict[str, Any] | None = None) -> None:
        self._dtype = np.dtype(DTYPES[dtype]).newbyteorder("<")
        self._name = name
        mode = "wb" if after is None else "r+b"
        self._tokens: IO[bytes] = open(directory / f"{name}.bin", mode, buffering=1 << 20)  # noqa: SIM115 (close() does)
        self._offsets: IO[bytes] = open(directory / f"{name}.offsets", mode, buffering=1 << 16)  # noqa: SIM115
        self._sha256 = hashlib.sha256()
        self.num_tokens: int = after["num_tokens"] if after else 0
        self.num_documents: int = after["num_documents"] if after else 0
        if after is not None:
            self._tokens.truncate(self.num_tokens * self._dtype.itemsize)
            self._offsets.truncate(self.num_documents * 8)
            while block := self._tokens.read(1 << 22):
                self._sha256.update(block)
            self._offsets.seek(0, os.SEEK_END)

    def start_document(self) -> None:
        self._offsets.write(np.int64(self.num_tokens).astype("<i8").tobytes())
        self.num_documents += 1

    def write(self, ids: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._sha256.update(data)
        self._tokens.write(data)
        self.num_tokens += len(ids)

    def close(self) -> dict[str, Any]:
        """Flush, sync and close. Returns the stream's entry for the manifest."""
        entry = self.sync()
        self.abort()
        return entry

    def sync(self) -> dict[str, Any]:
        """Have all that was written on disk. Returns the entry for the manifest of the stream as it is now."""
        for file in (self._tokens, self._offsets):
            file.flush()
            os.fsync(file.fileno())
        return {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "dtype": np.dtype(self._dtype).name,
            "sha256": self._sha256.hexdigest(),
        }

    def abort(self) -> None:
        """Close the files as they are."""
        self._tokens.close()
        self._offsets.close()


def open_stream(
    directory: Path, name: str, entry: dict[str, Any], *, document_start_id: int | None, remedy: str | None = None
) -> TokenStream:
    """Map the stream that a `StreamWriter` wrote. UserError, naming the file, when its size is not the manifest's.

    remedy: what to do then; default: to have the directory built again.
    """
    remedy = remedy or f"delete {directory} to build it again"
    tokens = _map(
        directory / f"{name}.bin", np.dtype(DTYPES[entry["dtype"]]).newbyteorder("<"), entry["num_tokens"], remedy
    )
    offsets = _map(directory / f"{name}.offsets", np.dtype("<i8"), entry["num_documents"], remedy)
    return TokenStream(tokens, offsets, document_start_id, entry["sha256"], name)


def _map(path: Path, dtype: np.dtype, length: int, remedy: str) -> np.ndarray:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    if size != length * dtype.itemsize:
        expected = length * dtype.itemsize
        raise UserError(f"{path} has {size} bytes, its manifest says {expected}; {remedy}")
    # As a plain array: slicing a np.memmap makes another one each time, ten times as slow.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if length else np.empty(0, dtype)


def windows_of(tokens: Any, starts: np.ndarray, length: int) -> np.ndarray:
    """ids [len(starts), length]: what follows each of `starts` (int64) in an array or a `ShardedTokens`."""
    if isinstance(tokens, np.ndarray):
        return np.lib.stride_tricks.sliding_window_view(tokens, length)[starts]
    return tokens.windows(starts, length)
