"""What to read, how to cut it into tokens and how to serve them: the `data` group of the configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neurogen.errors import UserError

KINDS = ("stdlib", "text")
TOKENIZERS = ("bytes", "bpe")
BATCHINGS = ("lanes", "random")
SPLITS = ("documents", "tail")
BYTE_VOCAB_SIZE = 257


@dataclass
class DataConfig:
    """Settings of one data source. Every field is checked on construction.

    kind: `stdlib` (the .py files of the running Python's standard library) or `text` (see `path`).
    path: kind `text` only. A file, a directory (read recursively, hidden files left out) or a glob, or a list of them.
        `.jsonl` and `.jsonl.zst` hold one document a line under `text_field`; any other file is one document.
    tokenizer: `bytes` (256 ids and a document-start id) or `bpe` (byte-level, trained on the training part).
    vocab_size: size of the BPE vocabulary, document-start id included. Bytes have 257, so leave it null there.
    batching: `lanes` carries each lane through its own part of the stream; `random` gives independent windows.
    lanes, window: the shape [B, T] of a batch, B over all ranks together.
    split: `documents` sends each document to one side by the hash of its name; `tail` holds out the end of the text.
    validation_fraction: share of the documents (`documents`) or of the bytes (`tail`) that is validation, in (0, 1).
    validation_bytes: with `tail`, the exact number of bytes instead of a fraction.
    document_separator: null inserts a document-start id before each document, where the state is reset. A string is
        written after each document instead: one running text, no document-start ids, no resets.
    encoding_errors: `strict` stops at the first invalid UTF-8; `skip` leaves the document out; `replace` puts U+FFFD.
    empty_documents, bad_lines: `error`, or `skip` to leave out documents without text, and JSON lines without one.
    Whatever is skipped or replaced is counted in the corpus' `counts`.
    cache_dir: where token streams are kept; null is $NEUROGEN_CACHE, or .cache/neurogen under the current directory.

    Raises UserError, in one line that names the key, for a value out of range or a combination that means nothing.
    """

    kind: str = "stdlib"
    path: str | list[str] | None = None
    tokenizer: str = "bytes"
    vocab_size: int | None = None
    batching: str = "lanes"
    lanes: int = 16
    window: int = 256
    split: str = "tail"
    validation_fraction: float = 0.05
    validation_bytes: int | None = None
    document_separator: str | None = None
    text_field: str = "text"
    encoding_errors: str = "strict"
    empty_documents: str = "error"
    bad_lines: str = "error"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("tokenizer", self.tokenizer, TOKENIZERS)
        _one_of("batching", self.batching, BATCHINGS)
        _one_of("split", self.split, SPLITS)
        _one_of("encoding_errors", self.encoding_errors, ("strict", "skip", "replace"))
        _one_of("empty_documents", self.empty_documents, ("error", "skip"))
        _one_of("bad_lines", self.bad_lines, ("error", "skip"))
        _at_least("lanes", self.lanes, 1)
        _at_least("window", self.window, 1)
        self._check_path()
        self._check_vocabulary()
        self._check_split()
        if not isinstance(self.text_field, str) or not self.text_field:
            raise UserError(f"data.text_field is {self.text_field!r}; name the JSON field that holds the text")
        if self.document_separator == "":
            raise UserError("data.document_separator is empty; use null for document-start ids, or a string")

    @property
    def paths(self) -> list[str]:
        """`path` as a list, empty for kinds that take none."""
        if self.path is None:
            return []
        return [self.path] if isinstance(self.path, str) else list(self.path)

    def _check_path(self) -> None:
        if self.path is not None and not isinstance(self.path, str):
            if not isinstance(self.path, Sequence) or not all(isinstance(item, str) for item in self.path):
                raise UserError(f"data.path is {self.path!r}; give a path or a list of paths")
            self.path = list(self.path)
        if self.kind == "text" and (not self.paths or not all(self.paths)):
            raise UserError("data.path is empty; data.kind=text needs one, e.g. data.path=notes.txt")
        if self.kind == "stdlib" and self.path is not None:
            raise UserError(f"data.path={self.path} means nothing with data.kind=stdlib; use data=text")

    def _check_vocabulary(self) -> None:
        if self.tokenizer == "bpe":
            if self.vocab_size is None:
                raise UserError("data.vocab_size is null; data.tokenizer=bpe needs a number, e.g. data.vocab_size=4096")
            _at_least("vocab_size", self.vocab_size, BYTE_VOCAB_SIZE)
        elif self.vocab_size not in (None, BYTE_VOCAB_SIZE):
            raise UserError(
                f"data.vocab_size={self.vocab_size} with data.tokenizer=bytes, which has {BYTE_VOCAB_SIZE}; "
                "leave it null or use data.tokenizer=bpe"
            )

    def _check_split(self) -> None:
        fraction = self.validation_fraction
        if not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
            raise UserError(f"data.validation_fraction is {fraction!r}; it must lie between 0 and 1, both excluded")
        if self.validation_bytes is not None:
            _at_least("validation_bytes", self.validation_bytes, 1)
            if self.split != "tail":
                raise UserError("data.validation_bytes counts from the end of the text; it needs data.split=tail")


def default_cache_dir() -> Path:
    """$NEUROGEN_CACHE when it is set, else `.cache/neurogen` under the current directory."""
    return Path(os.environ.get("NEUROGEN_CACHE") or Path(".cache") / "neurogen")


def _one_of(key: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"data.{key} is {value!r}; choose one of {', '.join(choices)}")


def _at_least(key: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"data.{key} is {value!r}; it must be a whole number of at least {least}")
