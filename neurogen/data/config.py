"""What to read, how to cut it into tokens and how to serve them: the `data` group of the configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from neurogen.errors import UserError

KINDS = ("stdlib", "text", "slimpajama", "shards", "mixture")
TOKENIZERS = ("bytes", "bpe", "file", "shards")
BATCHINGS = ("lanes", "random")
SPLITS = ("documents", "tail")
BYTE_VOCAB_SIZE = 257


@dataclass
class DataConfig:
    """Settings of one data source. Every field is checked on construction.

    kind: `stdlib` (the .py files of the running Python's standard library), `text` (see `path`), `slimpajama` (a data
        set of the Hugging Face hub, or local shards of it under `path`), `shards` (a directory that
        scripts/prepare_data.py wrote) or `mixture` (see `sources`).
    path: a file, a directory (read recursively, hidden files left out) or a glob, or a list of them.
        `.jsonl` and `.jsonl.zst` hold one document a line under `text_field`; any other file is one document.
    sources: kind `mixture` only. Name of each source -> its settings, as here, and a `weight`. Weights share out lanes.
    tokenizer: `bytes` (256 ids and a document-start id), `bpe` (byte-level, trained on the training part), `file`,
        or `shards`, the one that shards carry, with kind `shards` only.
    tokenizer_path: with `file`: a directory saved by a tokenizer, a tokenizer.json or a SentencePiece .model.
    vocab_size: size of the BPE vocabulary, document-start id included. Leave it null otherwise.
    batching: `lanes` carries each lane through its own part of the stream; `random` gives independent windows.
    shuffle: with `lanes`: documents in a new order each epoch, drawn from the seed, instead of the stream's own.
    lanes, window: the shape [B, T] of a batch, B over all ranks together.
    split: `documents` sends each document to one side by the hash of its name; `tail` holds out the end of the text.
    validation_fraction: share of the documents (`documents`) or of the bytes (`tail`) that is validation, in (0, 1).
    validation_bytes: with `tail`, the exact number of bytes instead of a fraction.
    document_separator: null inserts a document-start id before each document, where the state is reset. A string is
        written after each document instead: one running text, no document-start ids, no resets.
    encoding_errors: `strict` stops at the first invalid UTF-8; `skip` leaves the document out; `replace` puts U+FFFD.
    empty_documents, bad_lines: `error`, or `skip` to leave out documents without text, and JSON lines without one.
    Whatever is skipped or replaced is counted in the corpus' `counts`.
    dataset, dataset_split, dataset_revision: kind `slimpajama` without `path`: what to stream from the hub; `dataset`
        may be a local directory in the hub's layout as well.
    dataset_mirror: address of a mirror of the hub, e.g. https://hf-mirror.com; null is the hub, or $HF_ENDPOINT.
    max_chunks, tokens_per_chunk: kind `slimpajama`: stop after this many training tokens, multiplied; null reads all.
    verify: kind `shards`: compare every shard with its sha256 before use.
    cache_dir: where token streams are kept; null is $NEUROGEN_CACHE, or .cache/neurogen under the current directory.

    Raises UserError, in one line that names the key, for a value out of range or a combination that means nothing.
    """

    kind: str = "stdlib"
    path: str | list[str] | None = None
    sources: dict[str, Any] | None = None
    tokenizer: str = "bytes"
    tokenizer_path: str | None = None
    vocab_size: int | None = None
    batching: str = "lanes"
    shuffle: bool = False
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
    dataset: str = "cerebras/SlimPajama-627B"
    dataset_split: str = "train"
    dataset_revision: str | None = None
    dataset_mirror: str | None = None
    max_chunks: int | None = None
    tokens_per_chunk: int = 1 << 20
    verify: bool = True
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
        self._check_sources()
        self._check_vocabulary()
        self._check_split()
        self._check_order()
        self._check_chunks()
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
        if self.kind in ("text", "shards") and (not self.paths or not all(self.paths)):
            raise UserError(f"data.path is empty; data.kind={self.kind} needs one, e.g. data.path=notes.txt")
        if self.kind in ("stdlib", "mixture") and self.path is not None:
            raise UserError(f"data.path={self.path} means nothing with data.kind={self.kind}; use data=text")
        if self.kind == "shards" and len(self.paths) > 1:
            raise UserError("data.path names several directories of shards; give one, or use data.kind=mixture")

    def _check_sources(self) -> None:
        if self.kind != "mixture":
            if self.sources:
                raise UserError(f"data.sources means nothing with data.kind={self.kind}; use data.kind=mixture")
            return
        if not self.sources:
            raise UserError("data.sources is empty; data.kind=mixture needs at least one named source with a weight")
        self.sources = {str(name): dict(settings) for name, settings in self.sources.items()}
        for name, settings in self.sources.items():
            weight = settings.get("weight")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
                raise UserError(f"data.sources.{name}.weight is {weight!r}; it must be a number above 0")
            self.source_config(name)
        if self.batching == "random":
            raise UserError(
                "data.batching=random with data.kind=mixture: weights share out lanes; use data.batching=lanes"
            )

    def source_config(self, name: str) -> DataConfig:
        """The settings of one source of a mixture: its own, else those of the mixture. UserError names a bad key."""
        assert self.sources is not None
        own = {key: value for key, value in self.sources[name].items() if key != "weight"}
        shared = ("lanes", "window", "batching", "tokenizer", "tokenizer_path", "vocab_size", "cache_dir", "sources")
        unknown = [key for key in own if key not in {field.name for field in fields(self)} or key in shared]
        if unknown:
            raise UserError(f"data.sources.{name}.{unknown[0]} is no setting of a source; see DataConfig")
        if own.get("kind") == "mixture":
            raise UserError(f"data.sources.{name}.kind is mixture; mixtures cannot be nested")
        inherited = {key: getattr(self, key) for key in _INHERITED}
        if own.get("kind") == "shards":
            inherited["tokenizer"] = "shards"
        try:
            return DataConfig(**{"kind": "text", **inherited, **own})
        except UserError as error:
            raise UserError(f"data.sources.{name}: {error}") from None

    def _check_vocabulary(self) -> None:
        if self.tokenizer == "bpe":
            if self.vocab_size is None:
                raise UserError("data.vocab_size is null; data.tokenizer=bpe needs a number, e.g. data.vocab_size=4096")
            _at_least("vocab_size", self.vocab_size, BYTE_VOCAB_SIZE)
        elif self.vocab_size is not None and (self.tokenizer, self.vocab_size) != ("bytes", BYTE_VOCAB_SIZE):
            raise UserError(
                f"data.vocab_size={self.vocab_size} with data.tokenizer={self.tokenizer}, which has a size of its own; "
                "leave it null or use data.tokenizer=bpe"
            )
        if (self.tokenizer == "file") != (self.tokenizer_path is not None):
            raise UserError(
                f"data.tokenizer is {self.tokenizer} and data.tokenizer_path {self.tokenizer_path!r}; "
                "a tokenizer read from files needs both data.tokenizer=file and its path"
            )
        if (self.tokenizer == "shards") != (self.kind == "shards"):
            raise UserError(
                f"data.tokenizer is {self.tokenizer} and data.kind is {self.kind}; shards carry their tokenizer, so "
                "data.kind=shards goes with data.tokenizer=shards and with no other"
            )

    def _check_split(self) -> None:
        fraction = self.validation_fraction
        if not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
            raise UserError(f"data.validation_fraction is {fraction!r}; it must lie between 0 and 1, both excluded")
        if self.validation_bytes is not None:
            _at_least("validation_bytes", self.validation_bytes, 1)
            if self.split != "tail":
                raise UserError("data.validation_bytes counts from the end of the text; it needs data.split=tail")

    def _check_order(self) -> None:
        if self.shuffle and self.batching == "random":
            raise UserError(
                "data.shuffle=true with data.batching=random: random windows are shuffled already; leave it false"
            )
        if self.shuffle and self.document_separator is not None:
            raise UserError(
                "data.shuffle=true with a data.document_separator: one running text has no documents to shuffle"
            )
        if self.kind == "shards" and self.document_separator is not None:
            raise UserError("data.document_separator with data.kind=shards: shards are made already; leave it null")

    def _check_chunks(self) -> None:
        _at_least("tokens_per_chunk", self.tokens_per_chunk, 1)
        if self.max_chunks is not None:
            _at_least("max_chunks", self.max_chunks, 1)
            if self.kind != "slimpajama":
                raise UserError(f"data.max_chunks means nothing with data.kind={self.kind}; use data=slimpajama")
        if self.dataset_mirror is not None and not str(self.dataset_mirror).startswith(("http://", "https://")):
            raise UserError(f"data.dataset_mirror is {self.dataset_mirror!r}; give an address, https://...")
        if self.kind != "slimpajama":
            return
        if self.split != "documents":
            raise UserError(
                "data.split=tail with data.kind=slimpajama: the end of a stream is not known; use documents"
            )
        if not self.paths and self.max_chunks is None:
            raise UserError(
                "data.max_chunks is null: the whole data set does not fit the cache; set data.max_chunks, "
                "or fetch it and give data.path, or prepare shards with scripts/prepare_data.py"
            )


_INHERITED = (
    "encoding_errors",
    "empty_documents",
    "bad_lines",
    "validation_fraction",
    "text_field",
    "shuffle",
    "verify",
)


def default_cache_dir() -> Path:
    """$NEUROGEN_CACHE when it is set, else `.cache/neurogen` under the current directory."""
    return Path(os.environ.get("NEUROGEN_CACHE") or Path(".cache") / "neurogen")


def _one_of(key: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"data.{key} is {value!r}; choose one of {', '.join(choices)}")


def _at_least(key: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"data.{key} is {value!r}; it must be a whole number of at least {least}")
