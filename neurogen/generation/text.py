"""Generation from text to text: a tokenizer and a model side by side."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.sample import Sampling
from neurogen.brain import BrainState
from neurogen.errors import UserError
from neurogen.generation.prompts import generate_prompts, read
from neurogen.generation.stream import generate_stream

if TYPE_CHECKING:
    from neurogen.model import NeuroGen


class TextTokenizer(Protocol):
    """What text generation needs of a tokenizer."""

    vocab_size: int
    document_start_id: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


@dataclass
class TextPiece:
    """New text of a stream.

    Arguments:
        text: whole characters alone; may be empty while a character or a stop string is incomplete.
        ids: tokens the stream has taken so far.
        log_prob: the sum of their log-probabilities.
        state: of one lane, which has read everything but the last of `ids`.
        ended: why the stream ends with this piece: `stop`, `length`, or None.
    """

    text: str
    ids: list[int]
    log_prob: float
    state: BrainState
    ended: str | None = None


@dataclass(frozen=True)
class Completion:
    """One reply to a prompt.

    Arguments:
        prompt, sample: which prompt, and which of its samples.
        text: whole characters up to a stop string.
        ids: the tokens of the text, up to and including the one that ended it.
        log_prob: the sum of their log-probabilities under the model's own softmax.
        ended: `stop` or `length`.
    """

    prompt: str
    sample: int
    text: str
    ids: list[int]
    log_prob: float
    ended: str

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


class Utf8Stream:
    """Bytes in, whole characters out; what is no UTF-8 becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What was held back: U+FFFD for an incomplete character, or nothing."""
        return self._decoder.decode(b"", final=True)


@dataclass
class StopMatcher:
    """Lets text pass up to the first of some strings, holding back what may be the beginning of one.

    Arguments:
        strings: none of them empty.
    """

    strings: tuple[str, ...]
    _held: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if "" in self.strings:
            raise UserError("a stop string is empty, which would end every reply at once; leave it out")

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string was met (it and what follows are dropped)."""
        text = self._held + text
        found = [at for at in (text.find(string) for string in self.strings) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, string) for string in self.strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back and proved to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of text begin `string`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


@dataclass(frozen=True)
class TextGenerator:
    """A model and its tokenizer.

    Arguments:
        starts_documents: whether the model's training text marked where documents start. If so a new text begins with
            that id, and drawing it ends a reply.
    """

    model: NeuroGen
    tokenizer: TextTokenizer
    starts_documents: bool = True

    def encode(self, text: str, *, new: bool = True) -> Tensor:
        """Ids `[T]` int64, T >= 1. `new` begins a document; without a past, a model that knows no document start reads
        an empty prompt as a line feed.

        Raises UserError for an empty text that goes on from a past.
        """
        ids = np.asarray(self.tokenizer.encode(text if text or self.starts_documents or not new else "\n"), np.int64)
        if new and self.starts_documents:
            ids = np.concatenate([[self.tokenizer.document_start_id], ids])
        if not len(ids):
            raise UserError("there is nothing to read; write something")
        return torch.from_numpy(ids.astype(np.int64))

    def split_stop(self, stop: Sequence[str | int]) -> tuple[list[int], tuple[str, ...]]:
        """Stop ids, the document start among them, and stop strings. Raises UserError for an empty string."""
        ids = [each for each in stop if isinstance(each, int)]
        strings = StopMatcher(tuple(each for each in stop if isinstance(each, str))).strings
        if self.starts_documents and self.tokenizer.document_start_id not in ids:
            ids.append(self.tokenizer.document_start_id)
        return ids, strings

    def stream(
        self,
        prompt: str,
        *,
        sampling: Sampling,
        max_new_tokens: int = 256,
        chunk_tokens: int = 16,
        seed: int = 0,
        stop: Sequence[str | int] = (),
        state: BrainState | None = None,
        weights: str | None = None,
    ) -> Iterator[TextPiece]:
        """A reply piece by piece.

        Arguments:
            prompt: begins a new document unless there is a state to go on from.
            stop: ids and strings that end the reply; a string may lie across tokens, and neither it nor what a token
                holds after it is shown.
            state: of one lane, which has read all of what came before.
            others: as for `generate_stream`.
        """
        ids = self.encode(prompt, new=state is None)
        stop_ids, strings = self.split_stop(stop)
        return self._stream(ids, sampling, max_new_tokens, chunk_tokens, seed, stop_ids, strings, state, weights)

    def _stream(
        self,
        prompt: Tensor,
        sampling: Sampling,
        max_new_tokens: int,
        chunk_tokens: int,
        seed: int,
        stop_ids: list[int],
        strings: tuple[str, ...],
        state: BrainState | None,
        weights: str | None,
    ) -> Iterator[TextPiece]:
        characters, matcher = Utf8Stream(), StopMatcher(strings)
        taken: list[int] = []
        log_prob = 0.0
        pieces = generate_stream(
            self.model,
            [prompt],
            max_new_tokens=max_new_tokens,
            chunk_tokens=chunk_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop_ids,
            state=state,
            weights=weights,
        )
        before = state
        for piece in pieces:
            (ids,), log_probs = piece.replies(), piece.log_probs[0].tolist()
            text, met, used = "", False, 0
            for token in ids:
                used += 1
                log_prob += log_probs[used - 1]
                shown, met = matcher.feed(characters.feed(self.tokenizer.decode_bytes([token])))
                text += shown
                if met:
                    break
            after = piece.state
            if used < len(ids):
                # The string ended before the piece did: its state has read on, so make it anew up to here.
                start = torch.tensor([taken[-1]]) if taken else prompt
                after = self._state_after(start, before, ids[: used - 1])
            taken = taken + ids[:used]
            before = after
            ended = "stop" if met or ids[used - 1] in stop_ids else None
            if ended is None and len(taken) == max_new_tokens:
                ended = "length"
            if ended and not met:
                shown, met = matcher.feed(characters.flush())
                text += shown + ("" if met else matcher.flush())
            yield TextPiece(text, taken, log_prob, after, ended)
            if ended:
                return

    def _state_after(self, start: Tensor, state: BrainState | None, ids: list[int]) -> BrainState:
        """The state that has read `start` and then `ids`."""
        row = torch.cat([start.cpu(), torch.tensor(ids, dtype=torch.int64)])[None].to(self.model.device)
        return read(self.model, row, self.model.init_state(1) if state is None else state)

    def complete(
        self,
        prompts: Sequence[str],
        *,
        sampling: Sampling,
        max_new_tokens: int = 256,
        seed: int = 0,
        num_samples: int = 1,
        stop: Sequence[str | int] = (),
        weights: str | None = None,
    ) -> list[Completion]:
        """Continue texts side by side, each `num_samples` times: a reply for each prompt and sample, in this order. For
        `weights` see `neurogen.generation.generate`."""
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}; it must be at least 1")
        stop_ids, strings = self.split_stop(stop)
        rows = [self.encode(prompt) for prompt in prompts for _ in range(num_samples)]
        out = generate_prompts(
            self.model,
            rows,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop_ids,
            weights=weights,
        )
        log_probs = out.log_probs.cpu()
        replies = []
        for lane, ids in enumerate(out.replies()):
            text, used, ended = self._cut(ids, strings)
            replies.append(
                Completion(
                    prompt=prompts[lane // num_samples],
                    sample=lane % num_samples,
                    text=text,
                    ids=ids[:used],
                    log_prob=float(log_probs[lane, :used].sum()),
                    ended="stop" if ended or ids[-1] in stop_ids else "length",
                )
            )
        return replies

    def _cut(self, ids: list[int], strings: tuple[str, ...]) -> tuple[str, int, bool]:
        """Text before the first stop string, tokens up to and including it, and whether there was one."""
        characters, matcher, text = Utf8Stream(), StopMatcher(strings), ""
        for used, token in enumerate(ids, start=1):
            shown, met = matcher.feed(characters.feed(self.tokenizer.decode_bytes([token])))
            text += shown
            if met:
                return text, used, True
        shown, met = matcher.feed(characters.flush())
        return text + shown + ("" if met else matcher.flush()), len(ids), met
