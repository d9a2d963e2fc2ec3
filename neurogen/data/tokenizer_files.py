"""From files to a tokenizer, of whichever kind they hold."""

from __future__ import annotations

import json
from pathlib import Path

from neurogen.data.bpe import BPE_FILE, BpeTokenizer
from neurogen.data.sentencepiece_tokenizer import MODEL_FILE, SentencePieceTokenizer
from neurogen.data.tokenizer import INFO_FILE, ByteTokenizer, Tokenizer
from neurogen.errors import UserError


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into the directory `path`, or one in a tokenizer.json or .model file.

    Raises UserError, naming the file, when it is missing or damaged, or is of a kind that this version does not know.
    """
    path = Path(path)
    by_suffix = "sentencepiece" if path.suffix == ".model" else "bpe"
    kind = _kind(path / INFO_FILE) if path.is_dir() else by_suffix
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        file = path / BPE_FILE if path.is_dir() else path
        try:
            return BpeTokenizer(_read(file).decode("utf-8"), origin=str(file))
        except UnicodeDecodeError:
            raise UserError(f"{file} is damaged: it is not UTF-8") from None
    if kind == "sentencepiece":
        file = path / MODEL_FILE if path.is_dir() else path
        return SentencePieceTokenizer(_read(file), origin=str(file))
    raise UserError(f"{path / INFO_FILE} names a tokenizer of kind {kind!r}, which this version does not know")


def _kind(path: Path) -> object:
    try:
        info = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(info, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return info.get("kind")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror}") from None
