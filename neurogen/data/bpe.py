"""Byte-level BPE through the `tokenizers` library: trained here, or read from a tokenizer.json."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from neurogen.data.tokenizer import Tokenizer, checked_ids, save_info
from neurogen.errors import UserError

BPE_FILE = "tokenizer.json"
DOCUMENT_START = "<|document_start|>"
# Tokens that tokenizers made elsewhere use to separate documents, most specific first.
DOCUMENT_STARTS = (DOCUMENT_START, "<|begin_of_text|>", "<|endoftext|>", "<s>", "</s>")


class BpeTokenizer(Tokenizer):
    """Byte-level BPE of the `tokenizers` library. Any UTF-8 text survives the round trip exactly.

    A text that spells out the document-start token is encoded as plain characters: only the pipeline starts documents.
    """

    kind = "bpe"
    needs_text = True
    exact = True

    def __init__(self, definition: str, *, origin: str = "tokenizer.json") -> None:
        """`definition` is the content of a tokenizer.json; `origin` names it in errors.

        Raises UserError when it is damaged, does not keep text exactly, or has none of DOCUMENT_STARTS.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
            settings = json.loads(definition)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{origin} is not a tokenizer of the `tokenizers` library ({error})") from None
        if reason := _why_inexact(settings):
            raise UserError(f"{origin} does not keep text exactly: {reason}; use a byte-level BPE")
        special = {token["content"] for token in settings.get("added_tokens", []) if token["special"]}
        start = next((token for token in DOCUMENT_STARTS if token in special), None)
        if start is None:
            raise UserError(
                f"{origin} has no special token to start a document with: none of {', '.join(DOCUMENT_STARTS)}"
            )
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._definition = definition
        self.document_start_id = next(
            i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.content == start
        )
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
        return b"".join([table[i] for i in checked_ids(ids, self.vocab_size).tolist()])

    def token_num_bytes(self) -> np.ndarray:
        return np.array([len(token) for token in self._token_bytes], dtype=np.int64)

    def save(self, directory: str | Path) -> None:
        save_info(directory, {"kind": self.kind})
        (Path(directory) / BPE_FILE).write_text(self._definition, encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"neurogen bpe\0" + self._definition.encode("utf-8")).hexdigest()

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        added = self._tokenizer.get_added_tokens_decoder()
        to_byte = {character: byte for byte, character in enumerate(_byte_characters())}
        table = []
        for i in range(self.vocab_size):
            token = self._tokenizer.id_to_token(i)
            if i in added:  # spelled as it is, unlike learned tokens
                table.append(b"" if added[i].special else added[i].content.encode("utf-8"))
            else:
                table.append(bytes(to_byte[c] for c in token or ""))
        return table


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's bytes_to_unicode)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _why_inexact(settings: dict[str, Any]) -> str | None:
    """What in a tokenizer.json would change text on the way, or None."""
    model = settings.get("model") or {}
    if model.get("type") != "BPE" or not set(_byte_characters()) <= set(model.get("vocab", ())):
        return "it is no BPE over all 256 bytes"
    if settings.get("normalizer") is not None:
        return "it has a normalizer"
    stages = settings.get("pre_tokenizer") or {}
    stages = stages.get("pretokenizers", [stages])
    if not any(stage.get("type") == "ByteLevel" for stage in stages):
        return "its pre-tokenizer is not byte-level"
    if any(stage.get("add_prefix_space") for stage in stages):
        return "it adds a space at the front"
    if any(stage.get("behavior") == "Removed" for stage in stages):
        return "its pre-tokenizer removes text"
    if any(token["lstrip"] or token["rstrip"] for token in settings.get("added_tokens", []) if not token["special"]):
        return "an added token swallows spaces"
    return None
