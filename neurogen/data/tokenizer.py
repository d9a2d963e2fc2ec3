"""Text to ids and back: the interface of every tokenizer, and the simplest one, bytes."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neurogen.errors import UserError

INFO_FILE = "tokenizer_info.json"


class Tokenizer(ABC):
    """What the data pipeline and a checkpoint need of a tokenizer.

    vocab_size: all ids, the document-start id included.
    needs_text: True when it refuses what is not valid UTF-8.
    exact: True when `decode_bytes(encode(text)) == text` for all the text it accepts.
    """

    kind: str
    needs_text: bool
    exact: bool
    vocab_size: int
    document_start_id: int

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text, 1-d arrays of unsigned integers, without document-start ids, whatever the text holds."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; a document-start id stands for none. UserError for an id out of range."""

    @abstractmethod
    def token_num_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: how many bytes of text each id stands for, 0 for special ids."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write what `load_tokenizer` needs into `directory` (created if missing), as JSON."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256, in hex, of everything that decides which ids a text gets."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of one text, a 1-d array of unsigned integers, without a document-start id."""
        return self.encode_batch([_to_bytes(text)])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no whole character, as at the end of a sample, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """Id = byte. 256 is the document-start id."""

    kind = "bytes"
    needs_text = False
    exact = True
    vocab_size = 257
    document_start_id = 256

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        array = checked_ids(ids, self.vocab_size)
        return array[array != self.document_start_id].astype(np.uint8).tobytes()

    def token_num_bytes(self) -> np.ndarray:
        num_bytes = np.ones(self.vocab_size, dtype=np.int64)
        num_bytes[self.document_start_id] = 0
        return num_bytes

    def save(self, directory: str | Path) -> None:
        save_info(directory, {"kind": self.kind})

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"neurogen bytes 257").hexdigest()


def checked_ids(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """`ids` as an int64 array. UserError for one outside the vocabulary."""
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise UserError(f"token id {outside[0]} is outside the vocabulary of {vocab_size}")
    return array


def _to_bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds half a character (a lone surrogate) at position {error.start}") from None


def save_info(directory: str | Path, info: dict[str, Any]) -> None:
    """Write what kind of tokenizer `directory` holds."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / INFO_FILE).write_text(json.dumps(info) + "\n", encoding="utf-8")
