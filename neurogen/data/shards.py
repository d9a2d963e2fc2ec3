"""Tokenised shards on disk: a directory of token streams, its manifest, and one stream over all of them.

<directory>/manifest.json            format, tokenizer, counts, and per shard: tokens, documents, type, sha256
<directory>/tokenizer_info.json ...  the tokenizer, as `Tokenizer.save` writes it
<directory>/train-00000.bin          ids, little-endian uint8, uint16 or uint32
<directory>/train-00000.offsets      int64, where in the shard each document starts
<directory>/validation-00000.bin ...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neurogen.data.corpus import PARTS, Corpus
from neurogen.data.stream import TokenStream, open_stream
from neurogen.data.tokenizer import Tokenizer
from neurogen.data.tokenizer_files import load_tokenizer
from neurogen.errors import UserError

FORMAT = "neurogen-shards-1"
MANIFEST = "manifest.json"


class ShardedTokens:
    """The ids of several arrays as one read-only sequence: `len`, `dtype`, and contiguous slices as arrays.

    What belongs to a mapped file is read when it is sliced, not before.
    """

    def __init__(self, arrays: Sequence[Any], *, dtype: np.dtype | None = None) -> None:
        self._arrays = arrays
        self._lengths = np.array([len(array) for array in arrays])
        self._ends = np.cumsum(self._lengths)
        self.dtype = arrays[0].dtype if dtype is None else dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(len(self))
        assert step == 1, step
        runs = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            array = self._arrays[shard]
            first = start - (int(self._ends[shard]) - len(array))
            runs.append(np.asarray(array[first : first + stop - start]))
            start += len(runs[-1])
            shard += 1
        joined = runs[0] if len(runs) == 1 else np.concatenate([*runs, np.empty(0, self.dtype)])
        return joined.astype(self.dtype, copy=False)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """ids [len(starts), length]: what follows each of `starts` (int64)."""
        ids = np.empty((len(starts), length), self.dtype)
        shards = np.searchsorted(self._ends, starts, side="right")
        firsts = starts - (self._ends - self._lengths)[shards]
        for row, (shard, first) in enumerate(zip(shards.tolist(), firsts.tolist())):
            run = self._arrays[shard][first : first + length]
            ids[row] = run if len(run) == length else self[int(starts[row]) : int(starts[row]) + length]
        return ids


@dataclass(frozen=True)
class ShardStream(TokenStream):
    """A stream whose ids lie in several files."""

    shards: tuple[TokenStream, ...] = ()

    @property
    def parts(self) -> Sequence[TokenStream]:
        return self.shards


def open_shards(directory: str | Path, *, verify: bool = True, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus in a directory that `prepare_shards` wrote.

    verify: read every shard and compare its sha256; without it, sizes only.
    tokenizer: what the reader is going to use, e.g. a checkpoint's. It must be the one that made the shards.

    Raises UserError, naming the file, for a missing or damaged file, a wrong hash, or another tokenizer.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    made_by = load_tokenizer(directory)
    for what, one in (("the tokenizer beside it is", made_by), ("the tokenizer to be used is", tokenizer)):
        if one is not None and one.fingerprint != manifest["tokenizer"]:
            raise UserError(
                f"{directory / MANIFEST} was made by tokenizer {manifest['tokenizer'][:12]}, but {what} {one.kind} "
                f"{one.fingerprint[:12]}; prepare the shards again or use theirs"
            )
    streams = {}
    for part in PARTS:
        shards = []
        for entry in manifest["shards"][part]:
            shard = open_stream(
                directory,
                entry["name"],
                entry,
                document_start_id=made_by.document_start_id,
                remedy="fetch or prepare it again",
            )
            if verify:
                _verify(directory, entry)
            shards.append(shard)
        streams[part] = _join(shards, part)
    return Corpus(made_by, streams["train"], streams["validation"], manifest["fingerprint"], manifest["counts"])


def manifest_digest(tokenizer: str, shards: dict[str, list[dict[str, Any]]]) -> str:
    """sha256 over the tokenizer's fingerprint and all shards' entries: what the manifest calls `fingerprint`."""
    return hashlib.sha256(json.dumps([FORMAT, tokenizer, shards], sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, read a few megabytes at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _verify(directory: Path, entry: dict[str, Any]) -> None:
    for suffix, key in ((".bin", "sha256"), (".offsets", "offsets_sha256")):
        path = directory / (entry["name"] + suffix)
        found = file_sha256(path)
        if found != entry[key]:
            raise UserError(
                f"{path} has sha256 {found[:12]}, but its manifest says {entry[key][:12]}; it was changed or damaged: "
                "fetch or prepare it again"
            )


def _join(shards: list[TokenStream], part: str) -> ShardStream:
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    offsets = np.concatenate([shard.document_offsets + start for shard, start in zip(shards, starts)])
    digest = hashlib.sha256("".join(shard.fingerprint for shard in shards).encode()).hexdigest()
    tokens: Any = ShardedTokens([shard.tokens for shard in shards])
    return ShardStream(tokens, offsets, shards[0].document_start_id, digest, part, tuple(shards))


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "scripts/prepare_data.py has not finished there" if directory.is_dir() else "no such directory"
        raise UserError(f"cannot read {path}: {error.strerror} ({hint})") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; prepare the shards again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is no manifest of {FORMAT}; prepare the shards again")
    try:
        digest = manifest_digest(manifest["tokenizer"], manifest["shards"])
        whole = digest == manifest["fingerprint"] and all(manifest["shards"][part] for part in PARTS)
    except KeyError as error:
        raise UserError(f"{path} is damaged: it has no {error}; prepare the shards again") from None
    if not whole:
        raise UserError(f"{path} was changed: it does not match its own fingerprint; prepare the shards again")
    return manifest
