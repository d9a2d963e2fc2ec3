"""Text -> tokens -> shards, over several processes, resumable after a kill.

One process reads documents and writes shards; the others only turn text into ids, in batches that come back in order.
So what is written does not depend on how many they are. A shard counts once its `.json` lies beside it; that file says
how many documents were done by then, and a later run carries on from there.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from neurogen.data.config import DataConfig
from neurogen.data.corpus import PARTS
from neurogen.data.documents import iterate_documents
from neurogen.data.shards import FORMAT, MANIFEST, file_sha256, manifest_digest
from neurogen.data.sources import SourceFile, find_sources
from neurogen.data.stream import StreamWriter, dtype_for
from neurogen.data.text_corpus import Piece, cache_key, make_tokenizer, split_pieces, tail_cut
from neurogen.data.tokenizer import INFO_FILE, Tokenizer
from neurogen.data.tokenizer_files import load_tokenizer
from neurogen.errors import UserError
from neurogen.storage.files import write_atomically

PLAN = "prepare.json"
BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Progress:
    """How far a preparation has come: the file being read, and what has been tokenised in this run."""

    path: Path
    text_bytes: int
    tokens: int


def prepare_shards(
    config: DataConfig,
    out: str | Path,
    *,
    shard_tokens: int = 1 << 26,
    workers: int = 1,
    long_documents: str = "error",
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Write the corpus of `config` as shards into the directory `out`, and return the manifest.

    shard_tokens: a shard holds whole documents, at most this many ids with their document-start ids.
    workers: processes that tokenise; 1 does it in this one. The result is the same for any number.
    long_documents: a document longer than a shard is an `error`, or is `split` into several documents.
    progress: called after each batch of about a megabyte of text.

    Called again after a kill, it carries on after the last whole shard. Raises UserError as `build_corpus` does, having
    removed what it wrote; for settings out of range; and when `out` holds something made from other files or settings.
    """
    _check(config, shard_tokens, workers, long_documents)
    out = Path(out)
    sources = find_sources(config)
    plan = {"key": cache_key(config, sources, None), "shard_tokens": shard_tokens, "long_documents": long_documents}
    if (done := _claim(out, plan)) is not None:
        return done
    for leftover in out.glob(".tmp-*"):  # of a preparation that was killed while it wrote
        leftover.unlink()
    try:
        return _write_shards(config, sources, out, plan, workers, progress)
    except UserError:
        # Mending the input or the settings makes another corpus, so what there is of this one is of no use.
        shutil.rmtree(out)
        raise


def _write_shards(
    config: DataConfig,
    sources: list[SourceFile],
    out: Path,
    plan: dict[str, Any],
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    cut = tail_cut(config, sources)
    tokenizer = _tokenizer(config, sources, cut, out)
    dtype = dtype_for(tokenizer.vocab_size - 1)
    writers = {
        part: _PartWriter(out, part, dtype, tokenizer, plan["shard_tokens"], plan["long_documents"]) for part in PARTS
    }
    counts: Counter[str] = Counter()
    pieces = split_pieces(iterate_documents(sources, config, counts), config, cut, align=tokenizer.needs_text)
    finished = {part: writer.num_finished for part, writer in writers.items()}
    try:
        _run(_remaining(pieces, finished), writers, tokenizer, out, workers, progress)
        shards = {part: writer.close() for part, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    for part, entries in shards.items():
        if not entries:
            raise UserError(
                f"the {part} part is empty: use more text, or another data.split or data.validation_fraction"
            )
    manifest = {
        "format": FORMAT,
        "fingerprint": manifest_digest(tokenizer.fingerprint, shards),
        "tokenizer": tokenizer.fingerprint,
        "plan": plan,
        "counts": dict(counts),
        "num_tokens": {part: sum(entry["num_tokens"] for entry in entries) for part, entries in shards.items()},
        "num_documents": {part: sum(entry["num_documents"] for entry in entries) for part, entries in shards.items()},
        "shards": shards,
    }
    write_json(out / MANIFEST, manifest)
    for path in [out / PLAN, *out.glob("*-*.json")]:
        path.unlink()
    return manifest


class _PartWriter:
    """Collects the documents of one part into shards. Knows from the disk how far an earlier run came."""

    def __init__(
        self, out: Path, part: str, dtype: str, tokenizer: Tokenizer, shard_tokens: int, long_documents: str
    ) -> None:
        self._out, self._part, self._dtype = out, part, dtype
        self._start = np.array([tokenizer.document_start_id], dtype=np.uint32)
        self._shard_tokens, self._split = shard_tokens, long_documents == "split"
        self._entries: list[dict[str, Any]] = []
        for number in itertools.count():
            path = out / f"{self._name(number)}.json"
            if not path.exists():
                break
            self._entries.append(json.loads(path.read_text(encoding="utf-8")))
        last = self._entries[-1] if self._entries else {"documents_done": 0, "fragments_done": 0}
        # Documents that earlier shards hold whole, and how many fragments of the next one they hold besides.
        self.num_finished: int = last["documents_done"]
        self._fragments_to_skip: int = last["fragments_done"]
        self._documents, self._fragments = self.num_finished, 0
        self._writer: StreamWriter | None = None
        self._origin: str | None = None
        self._runs: list[np.ndarray] = []
        self._size = 0

    def add(self, ids: np.ndarray, *, starts_document: bool, origin: str) -> None:
        """Append ids to the current document, or to a new one."""
        if starts_document:
            self._finish_document()
            self._origin = origin
        self._runs.append(ids)
        self._size += len(ids)
        room = self._shard_tokens - 1
        if self._size > room and not self._split:
            raise UserError(
                f"{self._origin} holds a document of more than shard_tokens={self._shard_tokens} tokens; "
                "raise shard_tokens or set long_documents=split"
            )
        if self._size > room:
            whole = np.concatenate(self._runs)
            while len(whole) > room:
                self._emit(whole[:room])
                whole = whole[room:]
            self._runs, self._size = [whole], len(whole)

    def close(self) -> list[dict[str, Any]]:
        """Finish the last document and shard. Returns the manifest's entries of all shards."""
        self._finish_document()
        self._commit()
        return [{key: entry[key] for key in entry if not key.endswith("_done")} for entry in self._entries]

    def abort(self) -> None:
        """Give up the shard that is not complete."""
        if self._writer is not None:
            self._writer.abort()
            for suffix in (".bin", ".offsets"):
                (self._out / f"{self._name(len(self._entries))}{suffix}").unlink(missing_ok=True)
            self._writer = None

    def _finish_document(self) -> None:
        if self._origin is None:
            return
        self._emit(np.concatenate(self._runs))
        self._documents += 1
        self._fragments = 0
        self._origin, self._runs, self._size = None, [], 0

    def _emit(self, ids: np.ndarray) -> None:
        if self._fragments_to_skip:
            self._fragments_to_skip -= 1
            self._fragments += 1
            return
        if self._writer is not None and self._writer.num_tokens + 1 + len(ids) > self._shard_tokens:
            self._commit()
        if self._writer is None:
            self._writer = StreamWriter(self._out, self._name(len(self._entries)), dtype=self._dtype)
        self._writer.start_document()
        self._writer.write(self._start)
        self._writer.write(ids)
        self._fragments += 1

    def _commit(self) -> None:
        if self._writer is None:
            return
        name = self._name(len(self._entries))
        entry = {"name": name, **self._writer.close()}
        entry["offsets_sha256"] = file_sha256(self._out / f"{name}.offsets")
        entry |= {"documents_done": self._documents, "fragments_done": self._fragments}
        write_json(self._out / f"{name}.json", entry)
        self._writer = None
        self._entries.append(entry)

    def _name(self, number: int) -> str:
        return f"{self._part}-{number:05d}"


def _remaining(pieces: Iterator[Piece], finished: dict[str, int]) -> Iterator[Piece]:
    """Leave out the first `finished` documents of each part."""
    seen = dict.fromkeys(finished, 0)
    for piece in pieces:
        seen[piece.part] += piece.starts_document
        if seen[piece.part] > finished[piece.part]:
            yield piece


def _run(
    pieces: Iterator[Piece],
    writers: dict[str, _PartWriter],
    tokenizer: Tokenizer,
    out: Path,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    text_bytes = tokens = 0
    for batch, encoded in _encoded(_batches(pieces), tokenizer, out, workers):
        for piece, ids in zip(batch, encoded):
            writers[piece.part].add(ids, starts_document=piece.starts_document, origin=piece.origin)
            text_bytes += len(piece.text)
            tokens += len(ids)
        if progress is not None:
            progress(Progress(batch[-1].path, text_bytes, tokens))


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    batches: Iterator[list[Piece]], tokenizer: Tokenizer, out: Path, workers: int
) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    """Each batch with its ids, in order. A few batches per worker are in flight, so memory stays bounded."""
    if workers == 1:
        for batch in batches:
            yield batch, tokenizer.encode_batch([piece.text for piece in batch])
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(str(out),)
    )
    try:
        waiting: deque[tuple[list[Piece], Future]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_in_worker, [piece.text for piece in batch])))
            if len(waiting) > 3 * workers:
                yield _collect(*waiting.popleft())
        while waiting:
            yield _collect(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(batch: list[Piece], future: Future) -> tuple[list[Piece], list[np.ndarray]]:
    ids, lengths = future.result()
    return batch, np.split(ids, np.cumsum(lengths)[:-1])


_worker_tokenizer: Tokenizer | None = None


def _start_worker(directory: str) -> None:
    global _worker_tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism here
    _worker_tokenizer = load_tokenizer(directory)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: one that was killed tells its workers nothing."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[bytes]) -> tuple[np.ndarray, list[int]]:
    assert _worker_tokenizer is not None
    encoded = _worker_tokenizer.encode_batch(texts)
    narrow = dtype_for(_worker_tokenizer.vocab_size - 1)
    return np.concatenate(encoded).astype(narrow), [len(ids) for ids in encoded]


def _check(config: DataConfig, shard_tokens: int, workers: int, long_documents: str) -> None:
    if config.kind not in ("stdlib", "text", "slimpajama") or (config.kind == "slimpajama" and not config.paths):
        raise UserError(f"data.kind={config.kind} cannot be prepared; shards are made from files: give data.path")
    if config.document_separator is not None:
        raise UserError("data.document_separator joins documents, but shards keep them apart; leave it null")
    if config.max_chunks is not None:
        raise UserError("data.max_chunks limits a stream, but shards hold all of their files; set data.max_chunks=null")
    if shard_tokens < 2:
        raise UserError(f"shard_tokens is {shard_tokens}; it must be at least 2")
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    if long_documents not in ("error", "split"):
        raise UserError(f"long_documents is {long_documents!r}; choose one of error, split")


def _claim(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Make `out` ours, or find it so. Returns the manifest when the work is done already."""
    finished, begun = out / MANIFEST, out / PLAN
    for path in (finished, begun):
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content["plan"] if path == finished else content
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error!r}); delete {out} and prepare again") from None
        if found != plan:
            raise UserError(
                f"{out} holds shards made from other files or settings; delete it or choose another directory"
            )
        return content if path == finished else None
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no shards; choose another directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    write_json(begun, plan)
    return None


def _tokenizer(config: DataConfig, sources: list[SourceFile], cut: int | None, out: Path) -> Tokenizer:
    """The tokenizer an earlier run left in `out`, or a new one, saved there with its info file last."""
    if (out / INFO_FILE).exists():
        return load_tokenizer(out)
    tokenizer = make_tokenizer(config, sources, cut)
    for stale in out.glob("tokenizer-*"):  # of a run that was killed right here
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix="tokenizer-", dir=out) as temporary:
        tokenizer.save(temporary)
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == INFO_FILE):
            os.replace(path, out / path.name)
    return tokenizer


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomically(path, json.dumps(content, indent=2).encode())
