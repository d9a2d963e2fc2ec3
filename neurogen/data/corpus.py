"""What a source of data comes to: a tokenizer and the streams it made."""

from __future__ import annotations

from dataclasses import dataclass, field

from neurogen.data.stream import TokenStream
from neurogen.data.tokenizer import Tokenizer

PARTS = ("train", "validation")


@dataclass(frozen=True)
class Corpus:
    """A tokenizer and its two streams.

    counts: documents read, and what was skipped or replaced, by reason.
    fingerprint: sha256 of the tokenizer and of all ids: equal exactly when two corpora would train alike.
    validation_sources: of a mixture, the validation stream of each source by name; else empty.
    """

    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream
    fingerprint: str
    counts: dict[str, int] = field(default_factory=dict)
    validation_sources: dict[str, TokenStream] = field(default_factory=dict)
