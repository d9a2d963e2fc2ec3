"""Build a corpus from text once, keep it as token streams in a cache, and map it on every later run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neurogen.data.bpe import BpeTokenizer
from neurogen.data.config import DataConfig, default_cache_dir
from neurogen.data.corpus import PARTS, Corpus
from neurogen.data.documents import Document, iterate_documents
from neurogen.data.hub import HubReader, StreamBroken
from neurogen.data.kept import PROGRESS, keep, read_progress, start_build, write_progress
from neurogen.data.sources import SourceFile, find_sources
from neurogen.data.stream import StreamWriter, dtype_for, open_stream
from neurogen.data.tokenizer import ByteTokenizer, Tokenizer
from neurogen.data.tokenizer_files import load_tokenizer
from neurogen.errors import UserError
from neurogen.storage.files import fsync_directory, write_durably

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ENCODE_BYTES = 4 << 20
NOTE_BYTES = 16 << 20  # of text from the hub between two notes of how far it was read


@dataclass(frozen=True)
class Piece:
    """A run of text bound for one part. `starts_document` is True on the first piece of a document in that part.

    origin, path: where it was read, for errors and progress.
    """

    part: str
    starts_document: bool
    text: bytes
    origin: str
    path: Path


def build_text_corpus(
    config: DataConfig, cache_dir: str | Path | None = None, *, tokenizer: Tokenizer | None = None
) -> Corpus:
    """The corpus of `config`, from the cache when the same files were tokenised alike before.

    cache_dir: default `config.cache_dir`, then $NEUROGEN_CACHE, then .cache/neurogen. Safe to call from several
    processes at once: each builds under a name of its own and the first to finish provides the result.
    tokenizer: used instead of the one `config` describes, e.g. the one a checkpoint carries.

    Raises UserError as `find_sources`, `iterate_documents` and the tokenizers do, and when a part comes out empty.
    Whatever is raised, nothing of the attempt stays in the cache; but where text from the hub was interrupted (a kill,
    Ctrl-C, a network that failed), what had come is kept and the next call carries on from there.
    """
    cache = Path(cache_dir or config.cache_dir or default_cache_dir())
    sources = find_sources(config)
    final = cache / cache_key(config, sources, tokenizer)
    if not final.exists():
        _build(config, sources, tokenizer, cache, final)
    return open_corpus(final)


def open_corpus(directory: str | Path) -> Corpus:
    """Map a corpus that `build_text_corpus` wrote. UserError, naming the file, when something is missing or damaged."""
    directory = Path(directory)
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = {part: manifest["streams"][part] for part in PARTS}
        start_id, fingerprint, counts = manifest["document_start_id"], manifest["fingerprint"], manifest["counts"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; delete {directory} to build it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); delete {directory} to build it again") from None
    streams = {part: open_stream(directory, part, entries[part], document_start_id=start_id) for part in PARTS}
    return Corpus(load_tokenizer(directory), streams["train"], streams["validation"], fingerprint, counts)


def documents_of(config: DataConfig, sources: list[SourceFile], counts: Counter[str]) -> Iterator[Document]:
    """The documents of `config`: of its files, or of the hub for a slimpajama without files."""
    if _reads_hub(config, sources):
        return HubReader(config, counts).documents()
    return iterate_documents(sources, config, counts)


def _reads_hub(config: DataConfig, sources: list[SourceFile]) -> bool:
    return config.kind == "slimpajama" and not sources


def training_text(config: DataConfig) -> Iterator[str]:
    """The text that training reads, piece by piece: what a tokenizer may be trained on."""
    sources = find_sources(config)
    return _training_text(config, sources, tail_cut(config, sources))


def _training_text(config: DataConfig, sources: list[SourceFile], cut: int | None) -> Iterator[str]:
    pieces = split_pieces(documents_of(config, sources, Counter()), config, cut, align=True)
    limit = _train_limit(config)
    size = 0
    for piece in pieces:
        if piece.part == "train":
            size += len(piece.text)
            yield piece.text.decode("utf-8")
        if limit is not None and size >= limit:  # a token is at least a byte, so no more text can be needed
            return


def _train_limit(config: DataConfig) -> int | None:
    return None if config.max_chunks is None else config.max_chunks * config.tokens_per_chunk


def cache_key(config: DataConfig, sources: list[SourceFile], tokenizer: Tokenizer | None) -> str:
    """sha256 of all that decides the streams: files by path, size and time of change, settings, tokenizer."""
    files = []
    for source in sources:
        stat = source.path.stat()
        files.append([str(source.path.resolve()), source.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    settings = {
        key: getattr(config, key)
        for key in ("split", "validation_fraction", "validation_bytes", "document_separator", "text_field",
                    "encoding_errors", "empty_documents", "bad_lines", "max_chunks", "tokens_per_chunk")
    }  # fmt: skip
    if tokenizer is None and config.tokenizer != "bpe":
        tokenizer = make_tokenizer(config, sources, None)  # cheap, and then the same text by bytes is the same corpus
    made_by = tokenizer.fingerprint if tokenizer else [config.tokenizer, config.vocab_size]
    hub = None if files else [config.dataset, config.dataset_split, config.dataset_revision]
    if hub and config.dataset_mirror is not None:
        hub.append(config.dataset_mirror)
    key = json.dumps([FORMAT_VERSION, files, hub, settings, made_by], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _build(
    config: DataConfig, sources: list[SourceFile], tokenizer: Tokenizer | None, cache: Path, final: Path
) -> None:
    # A separator is a piece of its own, so a note could fall between a document and what has to follow it.
    carry_on = _reads_hub(config, sources) and config.document_separator is None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = start_build(cache, final.name, carry_on=carry_on)
    except OSError as error:
        raise UserError(f"cannot write to the cache {cache}: {error.strerror}; set data.cache_dir") from None
    try:
        if carry_on:
            _write_from_hub(config, tokenizer, temporary, final.name)
        else:
            _write_from_files(config, sources, tokenizer, temporary)
        try:
            os.rename(temporary, final)
        except OSError:
            # Another process may have finished first; its result is as good, being made of the same input.
            if not final.exists():
                raise
        fsync_directory(cache)
    except StreamBroken as error:
        if keep(temporary):
            raise UserError(f"{error}; or try again: what had come is kept in {cache}") from error
        raise
    except OSError as error:
        raise UserError(f"cannot build the corpus in {cache}: {error.strerror}; set data.cache_dir") from error
    except KeyboardInterrupt:
        keep(temporary)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_from_files(
    config: DataConfig, sources: list[SourceFile], tokenizer: Tokenizer | None, directory: Path
) -> None:
    cut = tail_cut(config, sources)
    tokenizer = tokenizer or make_tokenizer(config, sources, cut)
    counts: Counter[str] = Counter()
    pieces = split_pieces(documents_of(config, sources, counts), config, cut, align=tokenizer.needs_text)
    with _writers(config, tokenizer, directory) as writers:
        _tokenize(pieces, config, tokenizer, writers)
        streams = {part: writer.close() for part, writer in writers.items()}
    tokenizer.save(directory)
    _write_manifest(config, tokenizer, streams, counts, directory)


def _write_from_hub(config: DataConfig, tokenizer: Tokenizer | None, directory: Path, key: str) -> None:
    """As `_write_from_files`; carries on where a stopped build in `directory` has left a note."""
    before = read_progress(directory)
    if before is None:
        tokenizer = tokenizer or make_tokenizer(config, [], None)
        tokenizer.save(directory)
    else:
        tokenizer = load_tokenizer(directory)
    counts = Counter(before["counts"] if before else {})
    reader = HubReader(config, counts, before["hub"] if before else None)
    with _writers(config, tokenizer, directory, before["streams"] if before else {}) as writers:

        def note() -> None:
            streams = {part: writer.sync() for part, writer in writers.items()}
            write_progress(directory, key, {"hub": reader.position(), "counts": counts, "streams": streams})

        if before is None and tokenizer.kind == "bpe":
            note()  # so that it is not trained again
        pieces = split_pieces(reader.documents(), config, None, align=tokenizer.needs_text)
        _tokenize(pieces, config, tokenizer, writers, note)
        streams = {part: writer.close() for part, writer in writers.items()}
    _write_manifest(config, tokenizer, streams, counts, directory)
    (directory / PROGRESS).unlink(missing_ok=True)


@contextlib.contextmanager
def _writers(
    config: DataConfig, tokenizer: Tokenizer, directory: Path, before: dict[str, Any] | None = None
) -> Iterator[dict[str, StreamWriter]]:
    text_ids = 256 if tokenizer.kind == "bytes" else tokenizer.vocab_size
    specials = () if config.document_separator is not None else (tokenizer.document_start_id,)
    dtype = dtype_for(max(text_ids - 1, *specials) if specials else text_ids - 1)
    writers = {part: StreamWriter(directory, part, dtype=dtype, after=(before or {}).get(part)) for part in PARTS}
    try:
        yield writers
    finally:
        for writer in writers.values():
            writer.abort()


def _write_manifest(
    config: DataConfig, tokenizer: Tokenizer, streams: dict[str, Any], counts: Counter[str], directory: Path
) -> None:
    for part, entry in streams.items():
        if not entry["num_documents"]:
            more = "more text" if config.max_chunks is None else "a larger data.max_chunks"
            other = "" if config.kind == "slimpajama" else "data.split=tail, "
            raise UserError(
                f"the {part} part is empty: data.split={config.split} with data.validation_fraction="
                f"{config.validation_fraction} left it none of {counts['documents']} documents; "
                f"use {other}another data.validation_fraction or {more}"
            )
    digest = hashlib.sha256(json.dumps([tokenizer.fingerprint, streams], sort_keys=True).encode()).hexdigest()
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": digest,
        "tokenizer": tokenizer.fingerprint,
        "document_start_id": None if config.document_separator is not None else tokenizer.document_start_id,
        "streams": streams,
        "counts": dict(counts),
    }
    write_durably(directory / MANIFEST, json.dumps(manifest, indent=2).encode())
    fsync_directory(directory)


def make_tokenizer(config: DataConfig, sources: list[SourceFile], cut: int | None) -> Tokenizer:
    """The tokenizer `config` asks for; BPE is trained on the training part. `cut` is `tail_cut`'s."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "file":
        assert config.tokenizer_path is not None
        return load_tokenizer(config.tokenizer_path)
    assert config.tokenizer == "bpe", config.tokenizer
    assert config.vocab_size is not None
    return BpeTokenizer.train(_training_text(config, sources, cut), vocab_size=config.vocab_size)


def tail_cut(config: DataConfig, sources: list[SourceFile]) -> int | None:
    """With split `tail`, the position in the joined text where validation begins. Reads the text once."""
    if config.split != "tail":
        return None
    separator = (config.document_separator or "").encode("utf-8")
    total = 0
    for document in documents_of(config, sources, Counter()):
        total += sum(len(piece) for piece in document.pieces()) + len(separator)
    held_out = config.validation_bytes
    if held_out is None:
        held_out = max(1, round(total * config.validation_fraction))
    if held_out >= total:
        by = "validation_fraction" if config.validation_bytes is None else "validation_bytes"
        raise UserError(
            f"data.{by}={getattr(config, by)} holds out {held_out} of the text's {total} bytes, which leaves none to "
            f"train on; lower data.{by} or give more text"
        )
    return total - held_out


def split_pieces(documents: Iterator[Document], config: DataConfig, cut: int | None, *, align: bool) -> Iterator[Piece]:
    """Send each piece of text to `train` or `validation`, the separator (if any) after each document.

    cut: None sends whole documents by the hash of their name; a number sends the text from that byte on to validation,
    moved back to the start of a character when `align`. A document that the cut divides starts anew in validation.
    """
    separator = (config.document_separator or "").encode("utf-8")
    position = 0
    for document in documents:
        hashed = int.from_bytes(hashlib.sha256(document.key.encode()).digest()[:8], "big") / 2**64
        started: set[str] = set()
        for piece in _with_separator(document, separator):
            if cut is None:
                runs = [("validation" if hashed < config.validation_fraction else "train", piece)]
            else:
                at = _cut_within(piece, cut - position, align=align)
                runs = [("train", piece[:at]), ("validation", piece[at:])]
            for part, text in runs:
                if text:
                    yield Piece(part, part not in started, text, document.origin, document.path)
                    started.add(part)
            position += len(piece)


def _with_separator(document: Document, separator: bytes) -> Iterator[bytes]:
    yield from document.pieces()
    if separator:
        yield separator


def _cut_within(piece: bytes, at: int, *, align: bool) -> int:
    at = min(max(at, 0), len(piece))
    while align and 0 < at < len(piece) and piece[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _tokenize(
    pieces: Iterator[Piece],
    config: DataConfig,
    tokenizer: Tokenizer,
    writers: dict[str, StreamWriter],
    note: Callable[[], None] | None = None,
) -> None:
    """Write the ids of `pieces`. note: called between documents, each time NOTE_BYTES of text have been written."""
    start = np.array([tokenizer.document_start_id], dtype=np.uint32)
    document_start = config.document_separator is None
    limit = _train_limit(config)
    train = writers["train"]

    def full() -> bool:
        return limit is not None and train.num_tokens >= limit

    def flush(batch: list[Piece]) -> None:
        for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch])):
            if full():
                return
            writer = writers[piece.part]
            if limit is not None and writer is train:
                ids = ids[: limit - train.num_tokens - (piece.starts_document and document_start)]
            if piece.starts_document:
                writer.start_document()
                if document_start:
                    writer.write(start)
            writer.write(ids)

    batch: list[Piece] = []
    size = unnoted = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= ENCODE_BYTES:
            flush(batch)
            if full():
                return
            unnoted += size
            batch, size = [], 0
            if note is not None and unnoted >= NOTE_BYTES:
                note()
                unnoted = 0
    flush(batch)
