"""Mixtures: shares of lanes, each source as it would be alone, and validation by source."""

import json

import numpy as np
import pytest
import torch

from neurogen.data import DataConfig, LaneBatches, build_corpus, make_batches, validation_batches
from neurogen.data.prepare import prepare_shards
from neurogen.data.shuffle import ShuffledLaneBatches
from neurogen.errors import UserError


@pytest.fixture
def sources(tmp_path):
    for name in ("code", "prose"):
        lines = (json.dumps({"text": f"{name} text number {i} {name * (i % 4)}"}) + "\n" for i in range(80))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return {
        "code": {"path": str(tmp_path / "code.jsonl"), "weight": 1},
        "prose": {"path": str(tmp_path / "prose.jsonl"), "weight": 3},
    }


def mixture(sources, **changes):
    return DataConfig(**{"kind": "mixture", "sources": sources, "lanes": 8, "window": 5, **changes})


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_source_is_served_as_alone_on_its_share_of_lanes(tmp_path, sources, shuffle):
    config = mixture(sources, shuffle=shuffle)
    corpus = build_corpus(config, tmp_path / "cache")
    batches = make_batches(corpus.train, config, seed=3)
    assert batches.lane_counts == [2, 6]
    kind = ShuffledLaneBatches if shuffle else LaneBatches
    alone = [
        kind(build_corpus(config.source_config(name), tmp_path / "cache").train, lanes=lanes, window=5, seed=3)
        for name, lanes in (("code", 2), ("prose", 6))
    ]
    for _ in range(30):
        batch, parts = next(batches), [next(part) for part in alone]
        for field in ("input_ids", "target_ids", "document_start"):
            assert torch.equal(getattr(batch, field), torch.cat([getattr(part, field) for part in parts]))
    assert batches.position == 150


def test_ranks_and_resume(tmp_path, sources):
    config = mixture(sources)
    corpus = build_corpus(config, tmp_path / "cache")
    whole = make_batches(corpus.train, config, seed=3)
    for _ in range(6):
        state = json.loads(json.dumps(whole.state_dict()))
        expected = next(whole)
        for world_size in (2, 4):
            parts = []
            for rank in range(world_size):
                batches = make_batches(corpus.train, config, seed=3, rank=rank, world_size=world_size)
                batches.load_state_dict(state)
                parts.append(next(batches).input_ids)
            assert torch.equal(expected.input_ids, torch.cat(parts))
    other = make_batches(corpus.train, config, seed=4)
    with pytest.raises(UserError, match="seed"):
        other.load_state_dict(state)


def test_validation_by_source_and_of_all(tmp_path, sources):
    corpus = build_corpus(mixture(sources), tmp_path / "cache")
    assert list(corpus.validation_sources) == ["code", "prose"]
    joined = np.concatenate([stream.tokens for stream in corpus.validation_sources.values()])
    np.testing.assert_array_equal(corpus.validation.tokens[:], joined)
    for stream in (corpus.validation, *corpus.validation_sources.values()):
        targets = [b.target_ids[b.target_ids != -100] for b in validation_batches(stream, lanes=3, window=11)]
        assert sum(len(t) for t in targets) == len(stream) - 1
    assert "prose" in corpus.tokenizer.decode(corpus.validation_sources["prose"].tokens[:])
    assert corpus.counts == {"code/documents": 80, "prose/documents": 80}


def test_one_bpe_for_all_sources(tmp_path, sources):
    corpus = build_corpus(mixture(sources, tokenizer="bpe", vocab_size=275), tmp_path / "cache")
    tokens = {corpus.tokenizer.decode([i]) for i in range(275)}
    assert any("co" in token for token in tokens)
    assert any("pr" in token or "ose" in token for token in tokens)


def test_shards_as_a_source(tmp_path, sources):
    text = DataConfig(kind="text", path=sources["prose"]["path"])
    prepare_shards(text, tmp_path / "shards")
    mixed = {**sources, "prose": {"kind": "shards", "path": str(tmp_path / "shards"), "weight": 1}}
    config = mixture(mixed)
    batches = make_batches(build_corpus(config, tmp_path / "cache").train, config, seed=1)
    assert batches.lane_counts == [4, 4]
    assert next(batches).input_ids.shape == (8, 5)
    with pytest.raises(UserError, match="prose is shards, which have a tokenizer"):
        build_corpus(mixture(mixed, tokenizer="bpe", vocab_size=270), tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, r"data\.sources\.code\.weight is 0"),
        ({"weight": None}, r"data\.sources\.code\.weight is None"),
        ({"weight": 0.01}, "less than one of 8 lanes"),
        ({"path": "/no/such.txt"}, r"data\.sources\.code: data\.path /no/such\.txt does not exist"),
        ({"colour": 1}, r"data\.sources\.code\.colour is no setting"),
        ({"lanes": 1}, r"data\.sources\.code\.lanes is no setting"),
        ({"kind": "mixture"}, "nested"),
        ({"split": "coin"}, r"data\.sources\.code: data\.split"),
        ({"document_separator": "--"}, "with and without document_separator"),
    ],
)
def test_faults_name_the_source(tmp_path, sources, change, message):
    sources["code"] |= change

    def serve():
        config = mixture(sources)
        return make_batches(build_corpus(config, tmp_path / "cache").train, config, seed=1)

    with pytest.raises(UserError, match=message) as caught:
        serve()
    assert "\n" not in str(caught.value)
