"""SlimPajama's format from local shards, and from the hub with its library replaced by a list."""

import json
import os
import sys
import types

import pytest
import zstandard

from neurogen.data import DataConfig, build_corpus
from neurogen.errors import UserError

NAMES = ["RedPajamaWikipedia", "RedPajamaGithub", "RedPajamaArXiv"]
RECORDS = [{"text": f"text {i} " * (i % 9 + 1), "meta": {"redpajama_set_name": NAMES[i % 3]}} for i in range(90)]


def slimpajama(**changes):
    return DataConfig(**{"kind": "slimpajama", "split": "documents", "validation_fraction": 0.1, **changes})


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        records = [dict(record) for record in RECORDS[shard * 30 : shard * 30 + 30]]
        if shard == 1:
            records = [{**record, "meta": json.dumps(record["meta"])} for record in records]
        if shard == 2:
            records = [{**record, "meta": str(record["meta"])} for record in records]
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        (tmp_path / f"example_{shard}.jsonl.zst").write_bytes(zstandard.compress(data))
    return str(tmp_path / "*.jsonl.zst")


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` package whose one function gives RECORDS; returns what it was asked for and how far it was read."""
    seen = {"read": 0}

    def load_dataset(name, **kwargs):
        seen.update(kwargs, name=name)

        def stream():
            for record in RECORDS:
                seen["read"] += 1
                yield record

        return stream()

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return seen


def test_local_shards_with_meta_of_either_kind(tmp_path, shards):
    corpus = build_corpus(slimpajama(path=shards), tmp_path / "cache")
    assert corpus.counts == {"documents": 90, **{f"set/{name}": 30 for name in NAMES}}
    assert len(corpus.train.document_offsets) + len(corpus.validation.document_offsets) == 90


def test_chunks_limit_the_training_tokens_exactly(tmp_path, shards):
    whole = build_corpus(slimpajama(path=shards), tmp_path / "cache")
    part = build_corpus(slimpajama(path=shards, max_chunks=3, tokens_per_chunk=111), tmp_path / "cache")
    assert part.train.tokens.tolist() == whole.train.tokens[:333].tolist()
    assert part.train.document_offsets.tolist() == [at for at in whole.train.document_offsets.tolist() if at < 333]


def test_the_hub_gives_the_same_records(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("neurogen.data.text_corpus.ENCODE_BYTES", 100)
    config = slimpajama(max_chunks=2, tokens_per_chunk=200, dataset="some/mirror", dataset_revision="abc")
    corpus = build_corpus(config, tmp_path / "cache")
    assert hub["name"] == "some/mirror"
    assert (hub["split"], hub["revision"], hub["streaming"]) == ("train", "abc", True)
    assert len(corpus.train) == 400
    assert 0 < hub["read"] < 40  # reading stopped when there was enough
    assert corpus.counts["documents"] <= hub["read"]
    decoded = corpus.tokenizer.decode(corpus.train.tokens)
    assert decoded.startswith("text 0 text" if "text 0 " in decoded[:7] else "text")
    read = hub["read"]
    build_corpus(config, tmp_path / "cache")
    assert hub["read"] == read  # from the cache
    trained = build_corpus(
        slimpajama(max_chunks=2, tokens_per_chunk=200, tokenizer="bpe", vocab_size=262), tmp_path / "cache"
    )
    assert trained.tokenizer.vocab_size == 262


def test_a_mirror_of_the_hub(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    mirror = "https://hub.example"
    config = slimpajama(max_chunks=1, tokens_per_chunk=200, dataset_mirror=mirror)
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)
    build_corpus(config, tmp_path / "cache")
    assert os.environ["HF_ENDPOINT"] == mirror
    read = hub["read"]
    build_corpus(slimpajama(max_chunks=1, tokens_per_chunk=200), tmp_path / "cache")
    assert hub["read"] == 2 * read  # another hub is another source
    constants = types.ModuleType("constants")
    constants.ENDPOINT = "https://huggingface.co"
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", constants)
    with pytest.raises(UserError, match=r"hub\.example comes too late: .*set HF_ENDPOINT") as caught:
        build_corpus(config, tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_a_record_without_text_is_named(tmp_path, hub, monkeypatch):
    monkeypatch.setitem(RECORDS[4], "text", None)
    with pytest.raises(UserError, match="some/mirror record 5 has no text under 'text'"):
        build_corpus(slimpajama(max_chunks=9, dataset="some/mirror"), tmp_path / "cache")


def test_no_network(tmp_path, monkeypatch):
    module = types.ModuleType("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nand more lines")

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(UserError, match=r"cannot stream .*Couldn't reach the hub\).*set data\.path") as caught:
        build_corpus(slimpajama(max_chunks=1), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"package datasets, which is missing; .*set data\.path"):
        build_corpus(slimpajama(max_chunks=1), tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "data.max_chunks is null"),
        ({"max_chunks": 0}, "data.max_chunks"),
        ({"max_chunks": 1, "split": "tail"}, "data.split"),
        ({"max_chunks": 1, "dataset_mirror": "hf-mirror"}, "data.dataset_mirror is 'hf-mirror'"),
    ],
)
def test_bad_settings(changes, named):
    with pytest.raises(UserError, match=named):
        slimpajama(**changes)
    with pytest.raises(UserError, match=r"data\.max_chunks means nothing"):
        DataConfig(max_chunks=3)
