"""Several sources with weights: each lane reads one of them, and each is evaluated by itself."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from neurogen.data.batches import Batches, CarriedBatches, LaneBatches
from neurogen.data.bpe import BpeTokenizer
from neurogen.data.config import DataConfig
from neurogen.data.corpus import Corpus
from neurogen.data.shards import ShardedTokens, open_shards
from neurogen.data.shuffle import ShuffledLaneBatches
from neurogen.data.stream import TokenStream
from neurogen.data.text_corpus import build_text_corpus, training_text
from neurogen.data.tokenizer import ByteTokenizer, Tokenizer
from neurogen.data.tokenizer_files import load_tokenizer
from neurogen.errors import UserError


@dataclass(frozen=True)
class MixtureStream(TokenStream):
    """The training streams of a mixture, one after the other, and how its lanes are to be shared out."""

    sources: tuple[TokenStream, ...] = ()
    weights: tuple[float, ...] = ()


def build_mixture(
    config: DataConfig, cache_dir: str | Path | None = None, *, tokenizer: Tokenizer | None = None
) -> Corpus:
    """The corpus of a mixture: one tokenizer for all sources, BPE being trained on the training text of all of them.

    Raises UserError, naming the source, as the builders of the sources do; when shards were made by another tokenizer;
    and when some sources have a document_separator and others document starts.
    """
    assert config.sources is not None
    settings = {name: config.source_config(name) for name in config.sources}
    tokenizer = tokenizer or _shared_tokenizer(config, settings)
    corpora = {}
    for name, source in settings.items():
        try:
            if source.kind == "shards":
                corpus = open_shards(source.paths[0], verify=source.verify, tokenizer=tokenizer)
            else:
                corpus = build_text_corpus(source, cache_dir or config.cache_dir, tokenizer=tokenizer)
        except UserError as error:
            raise UserError(f"data.sources.{name}: {error}") from None
        corpora[name] = corpus
    if len({corpus.train.document_start_id for corpus in corpora.values()}) > 1:
        raise UserError("data.sources mixes sources with and without document_separator; treat all of them alike")
    validation = {name: replace(corpus.validation, name=f"{name} validation") for name, corpus in corpora.items()}
    train = {name: replace(corpus.train, name=f"{name} train") for name, corpus in corpora.items()}
    weights = tuple(float(config.sources[name]["weight"]) for name in corpora)
    counts: Counter[str] = Counter()
    for name, corpus in corpora.items():
        counts.update({f"{name}/{key}": value for key, value in corpus.counts.items()})
    digest = json.dumps([[name, corpora[name].fingerprint, weight] for name, weight in zip(corpora, weights)])
    return Corpus(
        tokenizer,
        _join(train, "train", weights),
        _join(validation, "validation", weights),
        hashlib.sha256(digest.encode()).hexdigest(),
        dict(counts),
        validation,
    )


class MixtureBatches(Batches):
    """Lanes shared out among the sources by weight; each source serves its lanes as it would alone.

    Shares are whole lanes, by largest remainder: `lane_counts` says how many each source got, in the mixture's order.
    Raises UserError when a source would get no lane, and as `CarriedBatches` for each source.
    """

    kind = "mixture"

    def __init__(
        self, stream: MixtureStream, *, lanes: int, window: int, shuffle: bool = False, seed: int = 0, rank: int = 0,
        world_size: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(stream, lanes=lanes, window=window, seed=seed, rank=rank, world_size=world_size)
        self.lane_counts = share_lanes(stream, lanes)
        carried: type[CarriedBatches] = ShuffledLaneBatches if shuffle else LaneBatches
        self._members: list[CarriedBatches] = []
        first = 0
        for source, count in zip(stream.sources, self.lane_counts):
            # All lanes of a source are counted, and those of this rank served: the same order on any number of ranks.
            mine = [lane - first for lane in self._rank_lanes if first <= lane < first + count]
            self._members.append(carried(source, lanes=count, window=window, seed=seed, only=mine))
            first += count

    @property
    def position(self) -> int:
        """Tokens each lane has read."""
        return self._members[0].position

    @property
    def epoch(self) -> int:
        """How many times the source that is read fastest was read."""
        return max(member.epoch for member in self._members)

    def next_window(self) -> tuple[np.ndarray, np.ndarray]:
        windows = [member.next_window() for member in self._members]
        return np.concatenate([ids for ids, _ in windows]), np.concatenate([resets for _, resets in windows])

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "sources": [member.state_dict() for member in self._members]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_identity(state, self._identity())
        for member, saved in zip(self._members, state["sources"]):
            member.load_state_dict(saved)


def share_lanes(stream: MixtureStream, lanes: int) -> list[int]:
    """Whole lanes for each source in proportion to the weights, by largest remainder; they add up to `lanes`."""
    weights = np.array(stream.weights) / sum(stream.weights)
    exact = weights * lanes
    counts = np.floor(exact).astype(int)
    for index in np.argsort(-(exact - counts), kind="stable")[: lanes - counts.sum()]:
        counts[index] += 1
    for source, weight, count in zip(stream.sources, weights, counts):
        if count == 0:
            raise UserError(f"{source.name} has a share of {weight:.3g}, less than one of {lanes} lanes; raise either")
    return [int(count) for count in counts]


def _shared_tokenizer(config: DataConfig, settings: dict[str, DataConfig]) -> Tokenizer:
    if config.tokenizer == "file":
        assert config.tokenizer_path is not None
        return load_tokenizer(config.tokenizer_path)
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    assert config.vocab_size is not None
    for name, source in settings.items():
        if source.kind == "shards":
            raise UserError(f"data.sources.{name} is shards, which have a tokenizer; use it by data.tokenizer=file")
    texts: Iterator[str] = chain.from_iterable(training_text(source) for source in settings.values())
    return BpeTokenizer.train(texts, vocab_size=config.vocab_size)


def _join(streams: dict[str, TokenStream], name: str, weights: tuple[float, ...]) -> MixtureStream:
    members = tuple(streams.values())
    widest = np.result_type(*(member.tokens.dtype for member in members))
    tokens: Any = ShardedTokens([member.tokens for member in members], dtype=widest)
    starts = np.cumsum([0, *(len(member) for member in members)])
    offsets = np.concatenate([member.document_offsets + start for member, start in zip(members, starts)])
    digest = json.dumps([[key, stream.fingerprint, weight] for (key, stream), weight in zip(streams.items(), weights)])
    fingerprint = hashlib.sha256(digest.encode()).hexdigest()
    return MixtureStream(tokens, offsets, members[0].document_start_id, fingerprint, name, members, weights)
