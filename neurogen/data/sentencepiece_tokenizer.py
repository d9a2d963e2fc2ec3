"""SentencePiece models, for corpora and systems that come with one. Needs the optional package `sentencepiece`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from neurogen.data.tokenizer import Tokenizer, checked_ids, save_info
from neurogen.errors import UserError

MODEL_FILE = "sentencepiece.model"
SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. The round trip is only as exact as the model's normalisation: `exact` is False.

    The document-start id is the model's begin-of-sentence id, or its end-of-sentence id where it has no other.
    A piece stands for its own bytes, U+2581 for a space; unknown and control pieces for none.
    """

    kind = "sentencepiece"
    needs_text = True
    exact = False

    def __init__(self, model: bytes, *, origin: str = MODEL_FILE) -> None:
        """`model` is the content of a .model file. UserError when it is damaged, or the package is missing."""
        try:
            import sentencepiece
        except ImportError:
            raise UserError(f"{origin} needs the package sentencepiece; install it, or neurogen[data]") from None
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # the binding raises RuntimeError and others
            raise UserError(f"{origin} is not a SentencePiece model ({error})") from None
        self._model = model
        self.vocab_size = self._processor.get_piece_size()
        ids = (self._processor.bos_id(), self._processor.eos_id())
        start_id = next((i for i in ids if i >= 0), None)
        if start_id is None:
            raise UserError(
                f"{origin} has neither a begin-of-sentence nor an end-of-sentence piece to start a document with"
            )
        self.document_start_id = start_id

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        try:
            strings = [text.decode("utf-8") for text in texts]
        except UnicodeDecodeError as error:
            raise UserError(f"a SentencePiece model takes valid UTF-8 only; byte {error.start} is not") from None
        return [np.array(ids, dtype=np.uint32) for ids in self._processor.encode(strings)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        array = checked_ids(ids, self.vocab_size)
        return self._processor.decode(array[array != self.document_start_id].tolist()).encode("utf-8")

    def token_num_bytes(self) -> np.ndarray:
        return self._num_bytes.copy()

    def save(self, directory: str | Path) -> None:
        save_info(directory, {"kind": self.kind})
        (Path(directory) / MODEL_FILE).write_bytes(self._model)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"neurogen sentencepiece\0" + self._model).hexdigest()

    @functools.cached_property
    def _num_bytes(self) -> np.ndarray:
        model = self._processor
        num_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for i in range(self.vocab_size):
            if model.is_byte(i):
                num_bytes[i] = 1
            elif not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i)):
                num_bytes[i] = len(model.id_to_piece(i).replace(SPACE, " ").encode("utf-8"))
        return num_bytes
