"""From settings to a corpus, whatever its kind."""

from __future__ import annotations

from pathlib import Path

from neurogen.data.config import DataConfig
from neurogen.data.corpus import Corpus
from neurogen.data.mixture import build_mixture
from neurogen.data.shards import open_shards
from neurogen.data.text_corpus import build_text_corpus
from neurogen.data.tokenizer import Tokenizer


def build_corpus(
    config: DataConfig, cache_dir: str | Path | None = None, *, tokenizer: Tokenizer | None = None
) -> Corpus:
    """The corpus of `config`, built on first use and mapped from disk afterwards.

    cache_dir: default `config.cache_dir`, then $NEUROGEN_CACHE, then .cache/neurogen under the current directory.
    tokenizer: used instead of the one `config` describes, e.g. the one a checkpoint carries.

    Raises UserError as `build_text_corpus`, `open_shards` and `build_mixture` do.
    """
    if config.kind == "shards":
        return open_shards(config.paths[0], verify=config.verify, tokenizer=tokenizer)
    if config.kind == "mixture":
        return build_mixture(config, cache_dir, tokenizer=tokenizer)
    return build_text_corpus(config, cache_dir, tokenizer=tokenizer)
