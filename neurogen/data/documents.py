"""From files to documents: UTF-8 text in pieces of bounded size, with every fault named by file and line or byte."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from neurogen.data.config import DataConfig
from neurogen.data.sources import SourceFile
from neurogen.errors import UserError

PIECE_BYTES = 1 << 20
ZST_READ_BYTES = 1 << 17


@dataclass(frozen=True)
class Document:
    """One document. `key` names it for the split, `origin` in errors; `pieces()` gives its text in valid UTF-8.

    A document from a JSON line is one piece, since the line is in memory already; of a file it is about 1 MB.
    """

    key: str
    origin: str
    path: Path
    pieces: Callable[[], Iterator[bytes]]


def iterate_documents(sources: list[SourceFile], config: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """The documents of `sources` in order. Adds what was read, skipped or replaced, by reason, to `counts`.

    Raises UserError naming the file, and the line or byte offset, for invalid UTF-8, an empty document, a JSON line
    without text, or a zst file that is cut short, unless `config` says to skip or replace.
    """
    for source in sources:
        documents = _jsonl_documents if source.is_jsonl else _plain_document
        before = counts["documents"] + counts["skipped"]
        for document in documents(source, config, counts):
            counts["documents"] += 1
            yield document
        if counts["documents"] + counts["skipped"] == before:
            _skip_empty(f"{source.path} holds no document", config, counts)


def _plain_document(source: SourceFile, config: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    path = source.path
    size, bad_offset = _check_utf8(path)
    if size == 0:
        _skip_empty(f"{path} is empty", config, counts)
        return
    fault = f"{path} is not valid UTF-8 at byte {bad_offset}"
    if bad_offset is not None and not _accept_invalid(fault, config, counts):
        return
    yield Document(source.name, str(path), path, lambda: _read_pieces(path))


def _check_utf8(path: Path) -> tuple[int, int | None]:
    """Size of the file and the offset of its first byte that is not UTF-8, if any. Reads it once, a piece at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = pending = 0
    with open_source(path) as file:
        while True:
            chunk = file.read(PIECE_BYTES)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return offset + len(chunk), offset - pending + error.start
            if not chunk:
                return offset, None
            offset += len(chunk)
            pending = len(decoder.getstate()[0])


def _read_pieces(path: Path) -> Iterator[bytes]:
    """The text of a file in pieces, cut after a newline where there is one. Invalid bytes become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = b""
    with open_source(path) as file:
        while chunk := file.read(PIECE_BYTES // 2):
            block = rest + decoder.decode(chunk).encode("utf-8")
            cut = block.rfind(b"\n") + 1 or len(block)
            rest = block[cut:]
            if cut:
                yield block[:cut]
    rest += decoder.decode(b"", final=True).encode("utf-8")
    if rest:
        yield rest


def _jsonl_documents(source: SourceFile, config: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    for number, line in enumerate(_lines(source.path), start=1):
        where = f"{source.path} line {number}"
        if not line.strip():
            counts["blank_lines"] += 1
            continue
        text = _text_of_line(line, where, config, counts)
        if text is None:
            continue
        key = f"{source.name}:{number}"
        yield Document(key, where, source.path, lambda text=text: iter((text,)))  # type: ignore[misc]


def _text_of_line(line: bytes, where: str, config: DataConfig, counts: Counter[str]) -> bytes | None:
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        if not _accept_invalid(f"{where} is not valid UTF-8 at byte {error.start} of the line", config, counts):
            return None
        decoded = line.decode("utf-8", errors="replace")
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        _skip_line(f"{where} is not JSON ({error})", config, counts)
        return None
    return text_of_record(record, where, config, counts)


def text_of_record(record: Any, where: str, config: DataConfig, counts: Counter[str]) -> bytes | None:
    """The text of a JSON record in UTF-8, or None to skip it. Counts and raises as `iterate_documents`."""
    text = record.get(config.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        _skip_line(f"{where} has no text under {config.text_field!r}", config, counts)
        return None
    if not text:
        _skip_empty(f"{where} has an empty {config.text_field!r}", config, counts)
        return None
    if config.kind == "slimpajama":
        counts[f"set/{_set_name(record.get('meta'))}"] += 1
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is valid JSON, but half a character
        if not _accept_invalid(f"{where} holds a lone surrogate, which is not valid UTF-8", config, counts):
            return None
        return text.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="replace").encode("utf-8")


def _set_name(meta: Any) -> str:
    """Which part of SlimPajama a record is from. Its `meta` is an object, or in some mirrors the text of one."""
    if isinstance(meta, str):
        try:
            meta = json.loads(meta.replace("'", '"'))
        except ValueError:
            return "unknown"
    name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else "unknown"


def _lines(path: Path) -> Iterator[bytes]:
    rest: list[bytes] = []
    num_lines = 0
    try:
        for chunk in _zst_chunks(path) if path.name.endswith(".zst") else _plain_chunks(path):
            *complete, last = chunk.split(b"\n")
            num_lines += len(complete)
            if complete:
                yield b"".join([*rest, complete[0]])
                yield from complete[1:]
                rest = []
            rest.append(last)
    except _BadFrame as error:
        raise UserError(f"{path} line {num_lines + 1}: {error}; fetch the file again") from None
    if final := b"".join(rest):
        yield final


class _BadFrame(Exception):
    """What is wrong with a zst file."""


def _plain_chunks(path: Path) -> Iterator[bytes]:
    with open_source(path) as file:
        while chunk := file.read(PIECE_BYTES):
            yield chunk


def _zst_chunks(path: Path) -> Iterator[bytes]:
    # zstandard's own stream reader takes a file that ends inside a frame for one that ends: only `eof` of the
    # decompression object tells them apart.
    frame = None
    with open_source(path) as file:
        while chunk := file.read(ZST_READ_BYTES):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    data = frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise _BadFrame(f"the zst file is damaged here ({error})") from None
                if data:
                    yield data
                chunk = b""
                if frame.eof:
                    chunk, frame = frame.unused_data, None
    if frame is not None:
        raise _BadFrame("the zst file is cut short here, it ends inside a frame")


def open_source(path: Path):
    """Open a file for reading bytes; UserError in one line when the system refuses."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _skip_empty(message: str, config: DataConfig, counts: Counter[str]) -> None:
    if config.empty_documents == "error":
        raise UserError(f"{message}; remove it or set data.empty_documents=skip")
    counts["skipped"] += 1
    counts["skipped_empty"] += 1


def _skip_line(message: str, config: DataConfig, counts: Counter[str]) -> None:
    if config.bad_lines == "error":
        raise UserError(f"{message}; mend it or set data.bad_lines=skip")
    counts["skipped"] += 1
    counts["skipped_bad_line"] += 1


def _accept_invalid(message: str, config: DataConfig, counts: Counter[str]) -> bool:
    """True when the text may be used with its invalid bytes replaced, False when the document is to be skipped."""
    if config.encoding_errors == "strict":
        raise UserError(f"{message}; convert it to UTF-8 or set data.encoding_errors=skip or replace")
    replace = config.encoding_errors == "replace"
    counts["replaced_invalid_utf8" if replace else "skipped_invalid_utf8"] += 1
    counts["skipped"] += not replace
    return replace
