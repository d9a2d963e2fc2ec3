"""Every bad setting ends in one line that names its key."""

from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from neurogen.data import DataConfig
from neurogen.data.config import default_cache_dir
from neurogen.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "video"}, "data.kind"),
        ({"tokenizer": "morse"}, "data.tokenizer"),
        ({"batching": "heap"}, "data.batching"),
        ({"split": "coin"}, "data.split"),
        ({"encoding_errors": "ignore"}, "data.encoding_errors"),
        ({"empty_documents": "keep"}, "data.empty_documents"),
        ({"bad_lines": "keep"}, "data.bad_lines"),
        ({"tokenizer": "file"}, "data.tokenizer is file and data.tokenizer_path None"),
        ({"tokenizer_path": "x"}, "data.tokenizer is bytes and data.tokenizer_path 'x'"),
        ({"tokenizer": "shards"}, "data.tokenizer is shards and data.kind is stdlib"),
        ({"kind": "shards", "path": "x"}, "data.tokenizer is bytes and data.kind is shards"),
        ({"kind": "shards", "path": ["x", "y"], "tokenizer": "shards"}, "data.path names several"),
        ({"kind": "shards", "path": "x", "tokenizer": "shards", "document_separator": "-"}, "data.document_separator"),
        ({"kind": "mixture"}, "data.sources is empty"),
        ({"sources": {"a": {"weight": 1}}}, "data.sources means nothing"),
        ({"kind": "mixture", "sources": {"a": {"weight": 1, "kind": "stdlib"}}, "batching": "random"}, "data.batching"),
        ({"shuffle": True, "batching": "random"}, "data.shuffle"),
        ({"shuffle": True, "document_separator": "-"}, "data.shuffle"),
        ({"tokens_per_chunk": 0}, "data.tokens_per_chunk"),
        ({"lanes": 0}, "data.lanes"),
        ({"lanes": 2.0}, "data.lanes"),
        ({"window": 0}, "data.window"),
        ({"window": True}, "data.window"),
        ({"kind": "text"}, "data.path"),
        ({"kind": "text", "path": []}, "data.path"),
        ({"kind": "text", "path": [""]}, "data.path"),
        ({"kind": "text", "path": [1]}, "data.path"),
        ({"path": "a.txt"}, "data.path"),
        ({"tokenizer": "bpe"}, "data.vocab_size"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "data.vocab_size"),
        ({"vocab_size": 4096}, "data.vocab_size"),
        ({"validation_fraction": 0.0}, "data.validation_fraction"),
        ({"validation_fraction": 1}, "data.validation_fraction"),
        ({"validation_bytes": 0}, "data.validation_bytes"),
        ({"validation_bytes": 5, "split": "documents"}, "data.validation_bytes"),
        ({"document_separator": ""}, "data.document_separator"),
        ({"text_field": ""}, "data.text_field"),
    ],
)
def test_bad_settings(settings, named):
    with pytest.raises(UserError) as caught:
        DataConfig(**settings)
    assert str(caught.value).startswith(named)
    assert "\n" not in str(caught.value)


def compose(name, *overrides):
    with hydra.initialize_config_dir(str(CONF.parent), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(f"data/{name}", list(overrides)).data)


MANDATORY = {
    "text": ["data.path=some.txt"],
    "enwiki": ["data.path=[a.txt,b.txt]"],
    "shards": ["data.path=prepared"],
    "mixture": ["data.sources={a: {path: a.txt, weight: 1}, b: {kind: stdlib, weight: 0.5}}"],
}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("[!_]*.yaml")))
def test_every_yaml_is_a_complete_config(name):
    missing = [key for key, value in compose(name).items() if value == "???"]
    assert missing == (["path"] if name in ("text", "enwiki", "shards") else [])
    settings = compose(name, *MANDATORY.get(name, []))
    assert set(settings) == set(DataConfig.__dataclass_fields__)
    DataConfig(**settings)


def test_the_base_yaml_holds_the_defaults():
    defaults = DataConfig(kind="text", path="x")
    base = compose("_base")
    assert base["path"] == "???"
    assert {**base, "path": "x"} == {key: getattr(defaults, key) for key in base}


def test_the_byte_benchmark_is_as_its_definition_says():
    settings = compose("enwiki")
    assert settings["document_separator"] == "\n\n\n"
    assert (settings["validation_bytes"], settings["lanes"], settings["window"]) == (1_000_000, 64, 512)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("NEUROGEN_CACHE", raising=False)
    assert default_cache_dir() == Path(".cache/neurogen")
    monkeypatch.setenv("NEUROGEN_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
