"""Build a corpus from text once, keep it as token streams in a cache, and map it on every later run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neurogen.data.bpe import BpeTokenizer
from neurogen.data.config import DataConfig, default_cache_dir
from neurogen.data.corpus import PARTS, Corpus
from neurogen.data.documents import Document, iterate_documents
from neurogen.data.hub import hub_documents
from neurogen.data.sources import SourceFile, find_sources
from neurogen.data.stream import StreamWriter, dtype_for, open_stream
from neurogen.data.tokenizer import ByteTokenizer, Tokenizer
from neurogen.data.tokenizer_files import load_tokenizer
from neurogen.errors import UserError
from neurogen.storage.files import fsync_directory, write_durably

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ENCODE_BYTES = 4 << 20


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
    Whatever is raised, nothing of the attempt stays in the cache.
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
    if config.kind == "slimpajama" and not sources:
        return hub_documents(config, counts)
    return iterate_documents(sources, config, counts)


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
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        temporary = Path(tempfile.mkdtemp(prefix=f"tmp-{socket.gethostname()}-{os.getpid()}-", dir=cache))
    except OSError as error:
        raise UserError(f"cannot write to the cache {cache}: {error.strerror}; set data.cache_dir") from None
    try:
        _write_corpus(config, sources, tokenizer, temporary)
        try:
            os.rename(temporary, final)
        except OSError:
            # Another process may have finished first; its result is as good, being made of the same input.
            if not final.exists():
                raise
        fsync_directory(cache)
    except OSError as error:
        raise UserError(f"cannot build the corpus in {cache}: {error.strerror}; set data.cache_dir") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_corpus(config: DataConfig, sources: list[SourceFile], tokenizer: Tokenizer | None, directory: Path) -> None:
    cut = tail_cut(config, sources)
    if tokenizer is None:
        tokenizer = make_tokenizer(config, sources, cut)
    separated = config.document_separator is not None
    counts: Counter[str] = Counter()
    specials = () if separated else (tokenizer.document_start_id,)
    text_ids = 256 if tokenizer.kind == "bytes" else tokenizer.vocab_size
    dtype = dtype_for(max(text_ids - 1, *specials) if specials else text_ids - 1)
    writers = {part: StreamWriter(directory, part, dtype=dtype) for part in PARTS}
    try:
        pieces = split_pieces(documents_of(config, sources, counts), config, cut, align=tokenizer.needs_text)
        _tokenize(pieces, tokenizer, writers, document_start=not separated, limit=_train_limit(config))
        streams = {part: writer.close() for part, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    for part, entry in streams.items():
        if not entry["num_documents"]:
            raise UserError(
                f"the {part} part is empty: data.split={config.split} with data.validation_fraction="
                f"{config.validation_fraction} left it none of {counts['documents']} documents; "
                "use data.split=tail or more text"
            )
    tokenizer.save(directory)
    digest = hashlib.sha256(json.dumps([tokenizer.fingerprint, streams], sort_keys=True).encode()).hexdigest()
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": digest,
        "tokenizer": tokenizer.fingerprint,
        "document_start_id": None if separated else tokenizer.document_start_id,
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
        raise UserError(f"data.validation_bytes is {held_out}, but the text has {total} bytes in all; lower it")
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
    tokenizer: Tokenizer,
    writers: dict[str, StreamWriter],
    *,
    document_start: bool,
    limit: int | None,
) -> None:
    start = np.array([tokenizer.document_start_id], dtype=np.uint32)
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
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= ENCODE_BYTES:
            flush(batch)
            batch, size = [], 0
            if full():
                return
    flush(batch)


def _remove_stale(cache: Path) -> None:
    """Remove what a killed process of this machine left half built."""
    prefix = f"tmp-{socket.gethostname()}-"
    for path in cache.glob(f"{prefix}*"):
        pid = path.name[len(prefix) :].split("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
