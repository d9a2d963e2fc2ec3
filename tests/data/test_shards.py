"""Preparing shards and reading them: the same whatever the workers and kills, and every fault named."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from neurogen.data import ByteTokenizer, DataConfig, build_corpus, make_batches, validation_batches
from neurogen.data import prepare as prepare_module
from neurogen.data.prepare import prepare_shards
from neurogen.data.shuffle import ShuffledLaneBatches
from neurogen.errors import UserError

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i}: " + "word " * (i * 7 % 23) + "ünïcode 世界" for i in range(60)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def settings(source, **changes):
    return DataConfig(
        **{"kind": "text", "path": str(source), "split": "documents", "validation_fraction": 0.2, **changes}
    )


def shards_config(out, **changes):
    return DataConfig(**{"kind": "shards", "path": str(out), "tokenizer": "shards", "lanes": 2, "window": 8, **changes})


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def decoded(stream, tokenizer):
    texts = []
    for shard in stream.parts:
        ends = [*shard.document_offsets[1:], len(shard)]
        assert (shard.tokens[shard.document_offsets] == tokenizer.document_start_id).all()
        texts += [tokenizer.decode(shard.tokens[a:b]) for a, b in zip(shard.document_offsets, ends)]
    return texts


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": "bpe", "vocab_size": 270}])
def test_shards_hold_what_the_corpus_holds(tmp_path, source, tokenizer):
    manifest = prepare_shards(settings(source, **tokenizer), tmp_path / "out", shard_tokens=400)
    corpus = build_corpus(shards_config(tmp_path / "out"))
    direct = build_corpus(settings(source, **tokenizer), tmp_path / "cache")
    assert corpus.tokenizer.fingerprint == direct.tokenizer.fingerprint
    assert corpus.counts == {"documents": 60}
    for part in ("train", "validation"):
        stream, expected = getattr(corpus, part), getattr(direct, part)
        np.testing.assert_array_equal(stream.tokens[:], expected.tokens)
        np.testing.assert_array_equal(stream.document_offsets, expected.document_offsets)
        assert sum(entry["num_tokens"] for entry in manifest["shards"][part]) == len(stream)
        assert all(entry["num_tokens"] <= 400 for entry in manifest["shards"][part])
    assert len(corpus.train.parts) > 2
    assert sorted(decoded(corpus.train, corpus.tokenizer) + decoded(corpus.validation, corpus.tokenizer)) == sorted(
        TEXTS
    )
    targets = sum(int((b.target_ids != -100).sum()) for b in validation_batches(corpus.validation, lanes=3, window=7))
    assert targets == len(corpus.validation) - 1


@pytest.mark.parametrize("long_documents", ["error", "split"])
def test_a_kill_at_any_moment_changes_nothing(tmp_path, source, monkeypatch, long_documents):
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 150)
    config = settings(source)
    kwargs = {"shard_tokens": 300 if long_documents == "error" else 70, "long_documents": long_documents}
    prepare_shards(config, tmp_path / "whole", **kwargs)
    expected = contents(tmp_path / "whole")
    killed = tmp_path / "killed"
    num_batches = []
    prepare_shards(config, tmp_path / "count", progress=num_batches.append, **kwargs)
    assert len(num_batches) > 20

    def stop_after(count):
        def callback(_):
            nonlocal count
            count -= 1
            if count == 0:
                raise KeyboardInterrupt

        return callback

    # A killed process cleans nothing up: leave its half-written shards lying.
    monkeypatch.setattr(prepare_module._PartWriter, "abort", lambda self: self._writer and self._writer.abort())
    for step in (3, 1, 9, 4):
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config, killed, progress=stop_after(step), **kwargs)
        with pytest.raises(UserError, match="has not finished"):
            build_corpus(shards_config(killed))
    rest = []
    prepare_shards(config, killed, progress=rest.append, **kwargs)
    assert len(rest) < len(num_batches)  # shards that were whole were not made again
    assert contents(killed) == expected


def test_a_killed_preparation_takes_its_workers_with_it_and_is_carried_on(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " + "word " * (i % 90)}) + "\n" for i in range(10000)))
    words = [f"data.path={path}", "data.split=documents", "shard_tokens=60000", "workers=2", f"out={tmp_path / 'out'}"]
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **silent)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "train-00001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert (tmp_path / "out" / "train-00001.json").exists()

    def is_running():  # anything of the killed process's group
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    while is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running()
    config = DataConfig(kind="text", path=str(path), split="documents")
    prepare_shards(config, tmp_path / "out", shard_tokens=60000)
    prepare_shards(config, tmp_path / "whole", shard_tokens=60000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_any_number_of_workers_writes_the_same(tmp_path, source, monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 300)
    config = settings(source, tokenizer="bpe", vocab_size=270)
    prepare_shards(config, tmp_path / "one", shard_tokens=400, workers=1)
    prepare_shards(config, tmp_path / "two", shard_tokens=400, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    again = prepare_shards(config, tmp_path / "two", shard_tokens=400)  # finished already
    assert again == json.loads((tmp_path / "one" / "manifest.json").read_text())


def test_a_document_longer_than_a_shard(tmp_path):
    source = tmp_path / "a.jsonl"
    texts = ["short one", "a very long document " * 20, "the end"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = settings(source, split="tail", validation_bytes=3)
    with pytest.raises(
        UserError, match=r"a\.jsonl line 2 holds a document of more than shard_tokens=50 tokens"
    ) as caught:
        prepare_shards(config, tmp_path / "out", shard_tokens=50)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    prepare_shards(config, tmp_path / "out", shard_tokens=50, long_documents="split")
    corpus = build_corpus(shards_config(tmp_path / "out"))
    texts_read = decoded(corpus.train, corpus.tokenizer)
    assert texts_read[0] == texts[0]
    assert "".join(texts_read[1:-1]) == texts[1]
    assert all(len(text) == 49 for text in texts_read[1:-2])
    assert max(len(shard) for shard in corpus.train.parts) == 50


def test_batches_of_shards(tmp_path, source):
    prepare_shards(settings(source), tmp_path / "out", shard_tokens=400)
    config = shards_config(tmp_path / "out", shuffle=True)
    batches = make_batches(build_corpus(config).train, config, seed=1)
    assert isinstance(batches, ShuffledLaneBatches)
    plain = shards_config(tmp_path / "out", batching="random")
    assert next(make_batches(build_corpus(plain).train, plain, seed=1)).input_ids.shape == (2, 8)
    ordered = shards_config(tmp_path / "out")
    batch = next(make_batches(build_corpus(ordered).train, ordered, seed=1))
    assert batch.input_ids.shape == (2, 8)


def test_damage_is_named(tmp_path, source):
    out = tmp_path / "out"
    prepare_shards(settings(source), out, shard_tokens=400)
    sound = contents(out)

    def expect(message, **changes):
        with pytest.raises(UserError, match=message) as caught:
            build_corpus(shards_config(out, **changes))
        assert "\n" not in str(caught.value)
        for name, data in sound.items():
            (out / name).write_bytes(data)

    for name in ("train-00001.bin", "train-00001.offsets"):
        data = bytearray(sound[name])
        data[5] ^= 1
        (out / name).write_bytes(data)
        expect(rf"{name} has sha256 \w+, but its manifest says")
        (out / name).write_bytes(sound[name][:-2])
        expect(rf"{name} has \d+ bytes.*; fetch or prepare it again", verify=False)
        (out / name).unlink()
        expect(f"cannot read .*{name}")
    manifest = json.loads(sound["manifest.json"])
    manifest["shards"]["train"][0]["num_tokens"] += 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    expect("manifest.json was changed")
    (out / "manifest.json").write_text("{}")
    expect("no manifest of neurogen-shards-1")
    (out / "manifest.json").write_bytes(sound["manifest.json"][:-9])
    expect("manifest.json is damaged")
    (out / "manifest.json").unlink()
    expect(r"cannot read .*manifest\.json")


def test_another_tokenizer(tmp_path, source):
    out = tmp_path / "out"
    prepare_shards(settings(source, tokenizer="bpe", vocab_size=270), out)
    with pytest.raises(UserError, match="but the tokenizer to be used is bytes"):
        build_corpus(shards_config(out), tokenizer=ByteTokenizer())
    ByteTokenizer().save(out)
    with pytest.raises(UserError, match="but the tokenizer beside it is bytes"):
        build_corpus(shards_config(out))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shard_tokens": 1}, "shard_tokens is 1"),
        ({"workers": 0}, "workers is 0"),
        ({"long_documents": "drop"}, "long_documents is 'drop'"),
    ],
)
def test_bad_settings(tmp_path, source, kwargs, message):
    with pytest.raises(UserError, match=message):
        prepare_shards(settings(source), tmp_path / "out", **kwargs)
    with pytest.raises(UserError, match="document_separator"):
        prepare_shards(settings(source, document_separator="--"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directories_that_hold_something_else(tmp_path, source):
    prepare_shards(settings(source), tmp_path / "out")
    with pytest.raises(UserError, match="made from other files or settings"):
        prepare_shards(settings(source), tmp_path / "out", shard_tokens=500)
    with pytest.raises(UserError, match="not empty and holds no shards"):
        prepare_shards(settings(source), tmp_path)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import prepare_data

    return prepare_data.main


def test_the_script(tmp_path, source, script, capsys):
    small = ["workers=1", "shard_tokens=400", "data.split=documents"]
    assert script([f"out={tmp_path / 'out'}", f"data.path={source}", *small]) == 0
    assert "train: " in capsys.readouterr().out
    assert len(build_corpus(shards_config(tmp_path / "out")).train.parts) > 1


def test_the_script_fails_in_one_line(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"text": "a"}\n{"txt": "b"}\n')
    path = str(ROOT / "scripts" / "prepare_data.py")
    monkeypatch.setattr(sys, "argv", [path, f"out={tmp_path / 'bad'}", f"data.path={broken}", "workers=1"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(path, run_name="__main__")
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "b.jsonl line 2 has no text under 'text'" in error
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=x"], "out is missing"),
        (["out=x", "data=text"], "data.path is missing"),
        (["out=x", "colour=red"], "'colour' is no setting"),
        (["out=x", "workers=two", "data.path=x"], "workers is 'two'"),
        (["out=x", "nonsense"], "'nonsense' is no setting"),
        (["out=x", "data.path=x", "data.lanes=0"], "data.lanes is 0"),
        (["out=x", "data=stdlib", "data.no_such_key=1"], "no_such_key"),
    ],
)
def test_bad_arguments(arguments, message, script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert script(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
