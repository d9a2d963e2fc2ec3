"""From files to streams: contents, order, split, faults, and what the cache holds afterwards."""

import errno
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard

from neurogen.data import ByteTokenizer, DataConfig, LaneBatches, build_corpus, open_corpus, text_corpus
from neurogen.data import documents as documents_module
from neurogen.data.sources import find_sources, stdlib_sources
from neurogen.data.stream import StreamWriter
from neurogen.errors import UserError

DOCS = ["first article\n", "second, with ünïcode 世界", "third\n\n\nwith gaps", "x" * 300, "the last one"]


def text_config(path, **settings):
    return DataConfig(**{"kind": "text", "path": str(path), **settings})


def write_jsonl(path, texts, *, compress=False, frames=1):
    lines = [json.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaWikipedia"}}) + "\n" for text in texts]
    if compress:
        chunks = np.array_split(np.arange(len(lines)), frames)
        data = b"".join(zstandard.compress("".join(lines[i] for i in chunk).encode()) for chunk in chunks)
        path.write_bytes(data)
    else:
        path.write_text("".join(lines), encoding="utf-8")
    return path


def texts_of(corpus, part):
    """Decode each document of a stream that has document-start ids."""
    stream = getattr(corpus, part)
    ends = [*stream.document_offsets[1:], len(stream)]
    assert (stream.tokens[stream.document_offsets] == corpus.tokenizer.document_start_id).all()
    return [corpus.tokenizer.decode(stream.tokens[a:b]) for a, b in zip(stream.document_offsets, ends)]


def leftovers(cache):
    return [path.name for path in cache.iterdir()] if cache.exists() else []


@pytest.mark.parametrize(("compress", "frames"), [(False, 1), (True, 1), (True, 3)])
@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": "bpe", "vocab_size": 260}])
def test_jsonl_documents_in_order_with_a_tail_for_validation(tmp_path, compress, frames, tokenizer):
    name = "a.jsonl.zst" if compress else "a.jsonl"
    path = write_jsonl(tmp_path / name, DOCS, compress=compress, frames=frames)
    total = sum(len(text.encode()) for text in DOCS)
    corpus = build_corpus(text_config(path, validation_fraction=0.5, **tokenizer), tmp_path / "cache")
    train, validation = texts_of(corpus, "train"), texts_of(corpus, "validation")
    assert "".join(train + validation) == "".join(DOCS)
    assert len("".join(validation).encode()) == round(total * 0.5)
    assert train[:3] == DOCS[:3]
    assert validation[-1] == DOCS[-1]
    assert validation[0] == DOCS[3][len(train[3]) :]
    assert corpus.counts == {"documents": 5}
    assert corpus.train.tokens.dtype == np.uint16


def test_byte_benchmark_format(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl.zst", DOCS, compress=True)
    config = text_config(path, document_separator="\n\n\n", validation_bytes=37)
    corpus = build_corpus(config, tmp_path / "cache")
    joined = "\n\n\n".join(DOCS).encode() + b"\n\n\n"
    assert corpus.train.tokens.dtype == np.uint8
    assert corpus.train.tokens.tobytes() == joined[:-37]
    assert corpus.validation.tokens.tobytes() == joined[-37:]
    assert corpus.train.document_start_id is None
    assert corpus.tokenizer.vocab_size == 257
    starts = [sum(len(text.encode()) + 3 for text in DOCS[:i]) for i in range(4)]
    assert corpus.train.document_offsets.tolist() == starts
    batch = next(LaneBatches(corpus.train, lanes=2, window=20, seed=9))
    assert not batch.document_start.any()


@pytest.mark.parametrize("separator", [None, "\n--\n"])
def test_the_tail_of_a_bpe_corpus_begins_with_a_whole_character(tmp_path, separator):
    path = tmp_path / "a.txt"
    text = "世界" * 50
    path.write_text(text, encoding="utf-8")
    settings = {"tokenizer": "bpe", "vocab_size": 257, "document_separator": separator}
    corpus = build_corpus(text_config(path, validation_bytes=10, **settings), tmp_path / "cache")
    ids = np.concatenate([corpus.train.tokens, corpus.validation.tokens])
    assert corpus.tokenizer.decode(ids) == text + (separator or "")
    assert "\ufffd" not in corpus.tokenizer.decode(corpus.validation.tokens)
    assert 10 <= len(corpus.tokenizer.decode_bytes(corpus.validation.tokens)) <= 13


def test_a_document_split_keeps_documents_whole_and_ignores_where_they_lie(tmp_path):
    texts = [f"document number {i} " * (i % 5 + 1) for i in range(200)]
    first = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "elsewhere").mkdir()
    second = write_jsonl(tmp_path / "elsewhere" / "a.jsonl", texts)
    parts = []
    for path in (first, second):
        corpus = build_corpus(text_config(path, split="documents", validation_fraction=0.2), tmp_path / "cache")
        train, validation = texts_of(corpus, "train"), texts_of(corpus, "validation")
        assert sorted(train + validation) == sorted(texts)
        assert train == [text for text in texts if text in set(train)]
        parts.append(validation)
    assert parts[0] == parts[1]
    assert 20 < len(parts[0]) < 65
    assert len(leftovers(tmp_path / "cache")) == 2


def test_a_split_without_validation(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["only one"])
    with pytest.raises(UserError, match=r"the (train|validation) part is empty.*data\.split=tail"):
        build_corpus(text_config(path, split="documents"), tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"data\.validation_bytes=8 holds out 8 of the text's 8 bytes.*lower data\.validation_bytes"
    ):
        build_corpus(text_config(path, validation_bytes=8), tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_files_directories_and_globs(tmp_path):
    for name in ("b/two.md", "b/one.py", "b/c/three.txt", "b/.hidden", "b/__pycache__/x.pyc", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "[odd].txt").write_text("a name with glob characters")
    paths = [str(tmp_path / "b"), str(tmp_path / "a*.txt"), str(tmp_path / "[odd].txt")]
    sources = find_sources(DataConfig(kind="text", path=paths))
    assert [source.name for source in sources] == ["c/three.txt", "one.py", "two.md", "a.txt", "[odd].txt"]
    recursive = find_sources(text_config(tmp_path / "**" / "*.txt"))
    assert {source.name for source in recursive} == {"three.txt", "a.txt", "[odd].txt"}
    corpus = build_corpus(DataConfig(kind="text", path=paths, validation_bytes=1), tmp_path / "cache")
    assert corpus.train.document_offsets.shape == (5,)


@pytest.mark.parametrize("block", [1, 7, 1 << 10])
def test_long_files_in_pieces(tmp_path, monkeypatch, block):
    monkeypatch.setattr(documents_module, "PIECE_BYTES", 2 * block)
    monkeypatch.setattr(documents_module, "ZST_READ_BYTES", block)
    text = "".join(f"line {i}: 世界 ünïcode\n" if i % 3 else "no newline, " for i in range(150))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl.zst", DOCS, compress=True, frames=2)
    config = DataConfig(kind="text", path=[str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl.zst")], validation_bytes=3)
    corpus = build_corpus(config, tmp_path / f"cache{block}")
    assert texts_of(corpus, "train") == [text, *DOCS[:-1], DOCS[-1][:-3]]


FAULTS = {
    "empty file": ("a.txt", b"", r"a\.txt is empty"),
    "empty jsonl": ("a.jsonl", b"", r"a\.jsonl holds no document"),
    "invalid utf-8": ("a.txt", b"caf\xe9 au lait", r"a\.txt is not valid UTF-8 at byte 3"),
    "cut character": ("a.txt", "世".encode()[:2], r"a\.txt is not valid UTF-8 at byte 0"),
    "invalid utf-8 in a line": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2 .* UTF-8 at byte 10"),
    "lone surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl line 1 holds a lone surrogate"),
    "no text": ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', r"a\.jsonl line 3 has no text under 'text'"),
    "text is no string": ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl line 1 has no text"),
    "no object": ("a.jsonl", b'"text"\n', r"a\.jsonl line 1 has no text"),
    "no json": ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl line 2 is not JSON"),
    "empty text": ("a.jsonl", b'{"text": "a"}\n{"text": ""}\n', r"a\.jsonl line 2 has an empty 'text'"),
    "truncated zst": ("a.jsonl.zst", zstandard.compress(b"[" * 99)[:-4], r"zst line 1: the zst file is cut short"),
    "no zst": ("a.jsonl.zst", b'{"text": "plain"}\n', r"zst line 1: the zst file is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("split", ["tail", "documents"])
def test_faults_in_one_line_and_nothing_left(tmp_path, fault, split):
    name, content, message = FAULTS[fault]
    (tmp_path / "0.txt").write_text("sound text before it")
    (tmp_path / name).write_bytes(content)
    config = DataConfig(kind="text", path=[str(tmp_path / "0.txt"), str(tmp_path / name)], split=split)
    with pytest.raises(UserError, match=message) as caught:
        build_corpus(config, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path / "cache") == []


def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path, monkeypatch):
    def refuse(self, ids):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.txt").write_text("some text " * 50)
    monkeypatch.setattr(StreamWriter, "write", refuse)
    with pytest.raises(UserError, match=r"cannot build the corpus in .*cache: No space left .*; set data\.cache_dir"):
        build_corpus(text_config(tmp_path / "a.txt"), tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []
    monkeypatch.undo()
    build_corpus(text_config(tmp_path / "a.txt"), tmp_path / "cache")


def test_skipped_and_replaced_text_is_counted(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "caf\xe9"}',
        b'{"text": ""}',
        b"{",
        b'{"text": "\\ud800!"}',
        b"",
        b'{"text": "end"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"na\xefve")
    (tmp_path / "c.txt").write_bytes(b"")
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.txt")]
    lenient = {"kind": "text", "path": paths, "validation_bytes": 1, "empty_documents": "skip", "bad_lines": "skip"}
    skipped = build_corpus(DataConfig(encoding_errors="skip", **lenient), tmp_path / "cache")
    assert "".join(texts_of(skipped, "train") + texts_of(skipped, "validation")) == "goodend"
    expected = {
        "documents": 2,
        "skipped": 6,
        "skipped_invalid_utf8": 3,
        "skipped_empty": 2,
        "skipped_bad_line": 1,
        "blank_lines": 1,
    }
    assert skipped.counts == expected
    replaced = build_corpus(DataConfig(encoding_errors="replace", **lenient), tmp_path / "cache")
    texts = texts_of(replaced, "train")
    assert texts[:2] == ["good", "caf\ufffd"]
    assert texts[2].strip("\ufffd") == "!"
    assert texts[3:] == ["end", "na\ufffdv"]
    assert replaced.counts["replaced_invalid_utf8"] == 3
    assert replaced.counts["skipped"] == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [("missing.txt", "does not exist"), ("*.txt", "matches no file"), ("empty", "is a directory without files")],
)
def test_paths_that_lead_nowhere(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        build_corpus(text_config(tmp_path / path), tmp_path / "cache")
    assert str(tmp_path / path) in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_file_named_twice(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="twice"):
        find_sources(DataConfig(kind="text", path=[str(tmp_path / "a.txt"), str(tmp_path / "*.txt")]))


def test_the_cache_is_used_and_follows_files_and_settings(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("some text to read " * 10)
    cache = tmp_path / "cache"
    config = text_config(path)
    first = build_corpus(config, cache)
    assert len(leftovers(cache)) == 1
    monkeypatch.setattr("neurogen.data.text_corpus._write_from_files", None)  # building again would fail
    again = build_corpus(text_config(path, lanes=3, window=5, batching="random"), cache)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.train.tokens, first.train.tokens)
    assert isinstance(again.train.tokens.base, np.memmap)
    monkeypatch.undo()
    other = build_corpus(text_config(path, validation_bytes=20), cache)
    assert other.fingerprint != first.fingerprint
    path.write_text("different now " * 10)
    changed = build_corpus(config, cache)
    assert changed.fingerprint != first.fingerprint
    assert len(leftovers(cache)) == 3


def test_a_given_tokenizer_is_used(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text to read " * 10)
    trained = build_corpus(text_config(path, tokenizer="bpe", vocab_size=260), tmp_path / "cache").tokenizer
    corpus = build_corpus(text_config(path), tmp_path / "cache", tokenizer=trained)
    assert corpus.tokenizer.fingerprint == trained.fingerprint
    assert build_corpus(text_config(path), tmp_path / "cache").tokenizer.kind == ByteTokenizer.kind
    num_cached = len(leftovers(tmp_path / "cache"))
    build_corpus(text_config(path), tmp_path / "cache", tokenizer=ByteTokenizer())
    assert len(leftovers(tmp_path / "cache")) == num_cached


def test_damage_in_the_cache_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text to read " * 10)
    build_corpus(text_config(path), tmp_path / "cache")
    (directory,) = (tmp_path / "cache").iterdir()
    stream = directory / "train.bin"
    whole = stream.read_bytes()
    stream.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=rf"train\.bin has {len(whole) - 3} bytes, its manifest says {len(whole)}"):
        open_corpus(directory)
    stream.unlink()
    with pytest.raises(UserError, match=r"cannot read .*train\.bin"):
        open_corpus(directory)
    (directory / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_corpus(directory)
    with pytest.raises(UserError, match=r"cannot read .*manifest\.json"):
        open_corpus(tmp_path)


def test_what_a_killed_build_left_is_removed(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path = tmp_path / "a.txt"
    path.write_text("some text")
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # as if that process had been killed while tokenising
        patch.setattr(text_corpus.os, "getpid", lambda: killed.pid)
        patch.setattr(text_corpus.shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(text_corpus, "_tokenize", die)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(text_config(path), cache)
    assert len(leftovers(cache)) == 1
    build_corpus(text_config(path), cache)
    (only,) = leftovers(cache)
    assert not only.startswith("tmp-")


def test_concurrent_builds_end_in_one_corpus(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", DOCS * 50)
    cache = tmp_path / "cache"
    all_building = threading.Barrier(3)
    tokenize = text_corpus._tokenize

    def together(*args, **kwargs):
        all_building.wait(timeout=60)
        tokenize(*args, **kwargs)
        all_building.wait(timeout=60)

    monkeypatch.setattr(text_corpus, "_tokenize", together)
    with ThreadPoolExecutor(3) as pool:
        corpora = list(pool.map(lambda _: build_corpus(text_config(path), cache), range(3)))
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert len(leftovers(cache)) == 1
    np.testing.assert_array_equal(corpora[0].train.tokens, corpora[2].train.tokens)


def test_standard_library(tmp_path, monkeypatch):
    sources = stdlib_sources()
    names = [source.name for source in sources]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name or "/tests/" in name or name.startswith("test/") for name in names)
    monkeypatch.setattr("neurogen.data.text_corpus.find_sources", lambda config: sources[:40])
    config = DataConfig(split="documents", encoding_errors="skip", empty_documents="skip", validation_fraction=0.1)
    corpus = build_corpus(config, tmp_path / "cache")
    texts = texts_of(corpus, "train") + texts_of(corpus, "validation")
    expected = [source.path.read_bytes().decode() for source in sources[:40]]
    assert sorted(texts) == sorted(text for text in expected if text)
    with pytest.raises(UserError, match=r"no \.py files"):
        stdlib_sources(tmp_path / "nowhere")
