"""SlimPajama's format from local shards, and from the hub with its library replaced by a list."""

import itertools
import json
import os
import shutil
import socket
import sys
import types
from collections import Counter

import pytest
import zstandard

from neurogen.data import DataConfig, build_corpus
from neurogen.data.hub import HubReader
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
    """A `datasets` package whose one function gives RECORDS; returns what it was asked for and how far it was read.

    `fail` in what it returns is called with each number before its record is given.
    """
    seen = {"read": 0, "opened": 0, "fail": lambda number: None}

    class Stream:
        def __init__(self):
            self.at = 0

        def __iter__(self):
            while self.at < len(RECORDS):
                seen["fail"](self.at)
                seen["read"] += 1
                self.at += 1
                yield RECORDS[self.at - 1]

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    def load_dataset(name, **kwargs):
        seen.update(kwargs, name=name, opened=seen["opened"] + 1)
        return Stream()

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


def facts(corpus):
    streams = [
        (stream.tokens.tolist(), stream.document_offsets.tolist()) for stream in (corpus.train, corpus.validation)
    ]
    return corpus.fingerprint, corpus.counts, streams


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": "bpe", "vocab_size": 262}])
@pytest.mark.parametrize("how", ["network", "ctrl-c", "kill"])
def test_an_interrupted_stream_is_carried_on(tmp_path, hub, monkeypatch, tokenizer, how):
    """Stopped before any record, it ends in the unbroken corpus, and only what came since the last note is read again.

    A tokenizer reads all of the text before; it is the tokenising that is stopped here.
    """
    monkeypatch.setattr("neurogen.data.text_corpus.ENCODE_BYTES", 100)
    monkeypatch.setattr("neurogen.data.text_corpus.NOTE_BYTES", 300)
    config = slimpajama(max_chunks=1, tokens_per_chunk=2000, **tokenizer)
    whole = facts(build_corpus(config, tmp_path / "unbroken"))
    read_by_unbroken, stopped = hub["read"], hub["opened"]
    for number in range(0, 48, 3):
        cache = tmp_path / str(number)
        hub["read"] = hub["opened"] = 0

        def fail(at, number=number, cache=cache):
            if (at, hub["opened"]) != (number, stopped):
                return
            if how == "network":
                raise ConnectionError("gone")
            if how == "kill":  # what a process that has ended by now would leave: this one's directory as it is
                (mine,) = cache.glob("tmp-*")
                shutil.copytree(mine, cache / f"tmp-{socket.gethostname()}-{2**22 + 1}-x")
            raise KeyboardInterrupt

        hub["fail"] = fail
        with pytest.raises(UserError if how == "network" else KeyboardInterrupt) as caught:
            build_corpus(config, cache)
        if how == "kill":
            shutil.rmtree(cache / next((path.name for path in cache.glob("partial-*")), "none"), ignore_errors=True)
        left = list(cache.iterdir())
        if how == "network":
            assert f"kept in {cache}" in str(caught.value) if left else "kept" not in str(caught.value)
        assert len(left) <= 1
        assert facts(build_corpus(config, cache)) == whole
        assert [path.name.split("-")[0] for path in cache.iterdir()] == [path.name for path in cache.iterdir()]
        assert hub["read"] <= read_by_unbroken + 20


def test_a_fault_in_a_record_leaves_nothing(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("neurogen.data.text_corpus.ENCODE_BYTES", 10)
    monkeypatch.setattr("neurogen.data.text_corpus.NOTE_BYTES", 10)
    monkeypatch.setitem(RECORDS[20], "text", None)
    with pytest.raises(UserError, match="record 21 has no text"):
        build_corpus(slimpajama(max_chunks=9), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_library_itself_streams_and_carries_on(tmp_path, monkeypatch):
    """With `datasets` installed: a directory in the hub's layout, read from every kind of position."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for shard in range(3):
        lines = "".join(json.dumps(record) + "\n" for record in RECORDS[shard * 30 : shard * 30 + 30])
        (tmp_path / "set" / f"chunk_{shard}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    config = slimpajama(max_chunks=1, dataset=str(tmp_path / "set"))
    texts = [record["text"].encode() for record in RECORDS]
    for taken in (0, 1, 29, 30, 31, 89, 90):
        counts = Counter()
        reader = HubReader(config, counts)
        first = [b"".join(document.pieces()) for document in itertools.islice(reader.documents(), taken)]
        position = json.loads(json.dumps(reader.position()))
        rest = list(HubReader(config, counts, position).documents())
        assert first + [b"".join(document.pieces()) for document in rest] == texts
        assert [document.origin.split()[-1] for document in rest] == [str(i + 1) for i in range(taken, 90)]
        assert counts == {"documents": 90, **{f"set/{name}": 30 for name in NAMES}}


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
