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

    @property
    def left_out(self) -> str:
        """What was skipped or replaced, by reason, in one line; empty where nothing was."""
        return left_out(self.counts)


def left_out(counts: dict[str, int]) -> str:
    """What `counts` says was skipped or replaced, by reason, in one line; empty where nothing was."""
    reasons = {key: count for key, count in counts.items() if _reason(key) and count}
    if not reasons:
        return ""
    documents = sum(count for key, count in counts.items() if key.rsplit("/", 1)[-1] == "documents")
    return f"data: {', '.join(f'{key} {count:,}' for key, count in reasons.items())}; {documents:,} documents are read"


def _reason(key: str) -> bool:
    return key.rsplit("/", 1)[-1].startswith(("skipped_", "replaced_"))
