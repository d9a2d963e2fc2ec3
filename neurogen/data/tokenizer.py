"""Text to ids and back. Two tokenizers behind one interface: bytes, and byte-level BPE."""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from neurogen.errors import UserError

DOCUMENT_START = "<|document_start|>"
INFO_FILE = "tokenizer_info.json"
BPE_FILE = "tokenizer.json"


class Tokenizer(ABC):
    """What every tokenizer promises: `decode_bytes(encode(text)) == text` for all the text it accepts.

    `vocab_size` counts all ids, the document-start id included. `needs_text` is True when it refuses invalid UTF-8.
    """

    kind: str
    needs_text: bool
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
    vocab_size = 257
    document_start_id = 256

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        array = _checked_ids(ids, self.vocab_size)
        return array[array != self.document_start_id].astype(np.uint8).tobytes()

    def token_num_bytes(self) -> np.ndarray:
        num_bytes = np.ones(self.vocab_size, dtype=np.int64)
        num_bytes[self.document_start_id] = 0
        return num_bytes

    def save(self, directory: str | Path) -> None:
        _save_info(directory, {"kind": self.kind})

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"neurogen bytes 257").hexdigest()


class BpeTokenizer(Tokenizer):
    """Byte-level BPE of the `tokenizers` library. Any UTF-8 text survives the round trip exactly.

    A text that spells out the document-start token is encoded as plain characters: only the pipeline starts documents.
    """

    kind = "bpe"
    needs_text = True

    def __init__(self, definition: str, *, origin: str = "tokenizer.json") -> None:
        """`definition` is the content of a tokenizer.json; `origin` names it in errors.

        Raises UserError when it is damaged, is not byte-level, or has no document-start token.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
            settings = json.loads(definition)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{origin} is not a tokenizer of the `tokenizers` library ({error})") from None
        if not _is_byte_level(settings):
            raise UserError(f"{origin} is not a byte-level BPE without normalizer, so its round trip is not exact")
        start_id = self._tokenizer.token_to_id(DOCUMENT_START)
        if start_id is None:
            raise UserError(f"{origin} has no token {DOCUMENT_START!r} to start a document with")
        self._tokenizer.encode_special_tokens = True
        self._definition = definition
        self.document_start_id = start_id
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def train(cls, texts: Iterator[str], *, vocab_size: int) -> BpeTokenizer:
        """Learn `vocab_size` tokens (at least 257) from `texts`. UserError when the text is too small for so many."""
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[DOCUMENT_START],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        learned = tokenizer.get_vocab_size()
        if learned < vocab_size:
            raise UserError(
                f"data.vocab_size is {vocab_size}, but the training text yields only {learned} tokens; "
                "lower it or use more text"
            )
        return cls(tokenizer.to_str())

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        try:
            strings = [text.decode("utf-8") for text in texts]
        except UnicodeDecodeError as error:
            raise UserError(f"a BPE tokenizer takes valid UTF-8 only; byte {error.start} is not") from None
        encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        table = self._token_bytes
        return b"".join([table[i] for i in _checked_ids(ids, self.vocab_size).tolist()])

    def token_num_bytes(self) -> np.ndarray:
        return np.array([len(token) for token in self._token_bytes], dtype=np.int64)

    def save(self, directory: str | Path) -> None:
        _save_info(directory, {"kind": self.kind})
        (Path(directory) / BPE_FILE).write_text(self._definition, encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"neurogen bpe\0" + self._definition.encode("utf-8")).hexdigest()

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        special = self._tokenizer.get_added_tokens_decoder()
        to_byte = {character: byte for byte, character in enumerate(_byte_characters())}
        table = []
        for i in range(self.vocab_size):
            token = self._tokenizer.id_to_token(i)
            table.append(b"" if i in special or token is None else bytes(to_byte[c] for c in token))
        return table


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote into `directory`. UserError, naming the file, when it is missing or damaged."""
    path = Path(directory) / INFO_FILE
    info = _read_json(path)
    kind = info.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        definition = Path(directory) / BPE_FILE
        try:
            return BpeTokenizer(definition.read_text(encoding="utf-8"), origin=str(definition))
        except OSError as error:
            raise UserError(f"cannot read tokenizer {definition}: {error.strerror}") from None
    raise UserError(f"{path} names a tokenizer of kind {kind!r}, which this version does not know")


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's bytes_to_unicode)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _is_byte_level(settings: dict[str, Any]) -> bool:
    decoder = settings.get("decoder") or {}
    kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))}
    model = settings.get("model") or {}
    normalizer = settings.get("normalizer")
    alphabet = set(_byte_characters()) <= set(model.get("vocab", ()))
    return model.get("type") == "BPE" and "ByteLevel" in kinds and normalizer is None and alphabet


def _checked_ids(ids: Iterable[int], vocab_size: int) -> np.ndarray:
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


def _save_info(directory: str | Path, info: dict[str, Any]) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / INFO_FILE).write_text(json.dumps(info) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content
