"""Every bad setting ends in one line that names its key."""

from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_is_a_complete_config(path):
    settings = yaml.safe_load(path.read_text())
    assert set(settings) == set(DataConfig.__dataclass_fields__)
    if settings["path"] == "???":
        settings["path"] = "some.txt"
    config = DataConfig(**settings)
    assert config.tokenizer == "bytes"


def test_the_byte_benchmark_is_as_its_definition_says():
    settings = yaml.safe_load((CONF / "enwiki.yaml").read_text())
    assert settings["document_separator"] == "\n\n\n"
    assert (settings["validation_bytes"], settings["lanes"], settings["window"]) == (1_000_000, 64, 512)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("NEUROGEN_CACHE", raising=False)
    assert default_cache_dir() == Path(".cache/neurogen")
    monkeypatch.setenv("NEUROGEN_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
