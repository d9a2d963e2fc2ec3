"""Round trips, byte counts and what a checkpoint carries."""

import json
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from neurogen.data import BpeTokenizer, ByteTokenizer, DataConfig, build_corpus, load_tokenizer
from neurogen.errors import UserError

TEXTS = ["def f(x):\n    return x + 1\n", "Grüße, 世界! 🧠\r\n\t", "the cat the dog the cat " * 20]
BPE = BpeTokenizer.train(iter(TEXTS), vocab_size=300)
BOTH = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=lambda tokenizer: tokenizer.kind)
NASTY = ["", " ", "\x00", "\ufeffbom", "a<|document_start|>b", "e\u0301 \u00e9", "\U0010ffff", "  \n\n\n  ", "Ġ▁"]


@BOTH
@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.document_start_id not in ids.tolist()
    assert tokenizer.token_num_bytes()[ids].sum() == len(text.encode())


@BOTH
@pytest.mark.parametrize("text", NASTY)
def test_round_trip_of_hard_cases(tokenizer, text):
    ids = tokenizer.encode(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.document_start_id not in ids.tolist()
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


@given(data=st.binary())
def test_bytes_take_any_bytes(data):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(data).tolist() == list(data)
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def test_bpe_compresses_and_agrees_with_the_library(tmp_path):
    BPE.save(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert BPE.vocab_size == 300 == reference.get_vocab_size()
    for text in TEXTS:
        assert BPE.encode(text).tolist() == reference.encode(text).ids
        assert len(BPE.encode(text)) < len(text.encode())


@BOTH
def test_document_start_is_an_id_of_no_bytes(tokenizer):
    start = tokenizer.document_start_id
    assert 0 <= start < tokenizer.vocab_size
    assert tokenizer.decode_bytes([start, *tokenizer.encode("x").tolist(), start]) == b"x"
    num_bytes = tokenizer.token_num_bytes()
    assert num_bytes.shape == (tokenizer.vocab_size,)
    assert np.flatnonzero(num_bytes == 0).tolist() == [start]


@BOTH
def test_half_a_character_is_shown_as_a_replacement(tokenizer):
    ids = tokenizer.encode("語")
    assert tokenizer.decode(ids[:1]).endswith("\ufffd")


@BOTH
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "deep" / "tokenizer")
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.document_start_id) == (tokenizer.vocab_size, tokenizer.document_start_id)
    for text in NASTY + TEXTS:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    for path in (tmp_path / "deep" / "tokenizer").iterdir():
        json.loads(path.read_text())


def test_fingerprints_tell_tokenizers_apart():
    other = BpeTokenizer.train(iter(TEXTS), vocab_size=290)
    again = BpeTokenizer.train(iter(TEXTS), vocab_size=300)
    assert again.fingerprint == BPE.fingerprint
    assert len({BPE.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}) == 3


@BOTH
@pytest.mark.parametrize("bad", [-1, 300])
def test_decoding_an_id_out_of_range(tokenizer, bad):
    with pytest.raises(UserError, match=f"token id {bad} is outside the vocabulary of {tokenizer.vocab_size}"):
        tokenizer.decode([0, bad])


@BOTH
def test_half_a_surrogate_pair(tokenizer):
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("ab\ud800")


def test_bpe_refuses_bytes_that_are_no_text():
    with pytest.raises(UserError, match="byte 1 is not"):
        BPE.encode(b"a\xff")


def test_vocabulary_larger_than_the_text_yields():
    with pytest.raises(UserError, match=r"data\.vocab_size is 9000, but the training text yields only \d+ tokens"):
        BpeTokenizer.train(iter(TEXTS), vocab_size=9000)


@pytest.mark.parametrize("start", ["<|endoftext|>", "<s>"])
def test_a_tokenizer_json_made_elsewhere(tmp_path, start):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s+|\S+"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<other>", start], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_tokens(["    "])
    made.enable_truncation(4)
    path = tmp_path / "their.json"
    path.write_text(made.to_str())
    tokenizer = load_tokenizer(path)
    assert tokenizer.document_start_id == 1
    assert tokenizer.vocab_size == 281
    text = f"a {start} b     c    <other> " + TEXTS[1]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_num_bytes()[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & {0, 1}
    assert 280 in ids


def test_a_tokenizer_file_for_a_corpus(tmp_path):
    BPE.save(tmp_path / "saved")
    (tmp_path / "a.txt").write_text(TEXTS[0] * 9)
    config = {"kind": "text", "path": str(tmp_path / "a.txt"), "tokenizer": "file"}
    for path in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json"):
        corpus = build_corpus(DataConfig(tokenizer_path=str(path), **config), tmp_path / "cache")
        assert corpus.tokenizer.fingerprint == BPE.fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with pytest.raises(UserError, match=r"cannot read tokenizer .*missing\.json"):
        build_corpus(DataConfig(tokenizer_path=str(tmp_path / "missing.json"), **config), tmp_path / "cache")


def test_missing_and_damaged_tokenizers(tmp_path):
    with pytest.raises(UserError, match=r"cannot read tokenizer .*tokenizer_info\.json"):
        load_tokenizer(tmp_path)
    BPE.save(tmp_path)
    definition = tmp_path / "tokenizer.json"
    definition.write_text(definition.read_text()[:-50])
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    definition.unlink()
    with pytest.raises(UserError, match=r"cannot read tokenizer .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_info.json").write_text('{"kind": "morse"}')
    with pytest.raises(UserError, match="morse"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_info.json").write_text("[1]")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)


def test_tokenizers_that_would_not_round_trip():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|document_start|>": 0, "a": 1}, unk_token="a"))
    with pytest.raises(UserError, match="no BPE over all 256 bytes"):
        BpeTokenizer(words.to_str())
    settings = json.loads(tokenizers.Tokenizer.from_str(BPE._definition).to_str())
    settings["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(UserError, match="normalizer"):
        BpeTokenizer(json.dumps(settings))
    settings["normalizer"] = None
    settings["added_tokens"] = []
    del settings["model"]["vocab"]["<|document_start|>"]
    with pytest.raises(UserError, match="no special token"):
        BpeTokenizer(json.dumps(settings))


def test_sentencepiece_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "a.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.model needs the package sentencepiece; install it"):
        load_tokenizer(tmp_path / "a.model")


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "the dog ate the cat"] * 30),
        model_prefix=str(tmp_path / "m"),
        vocab_size=300,
        byte_fallback=True,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=9,
    )
    tokenizer = load_tokenizer(tmp_path / "m.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    for text in ("the cat ate", "a zebra: 世界", "the"):
        ids = tokenizer.encode(text)
        assert ids.tolist() == reference.encode(text)
        assert tokenizer.decode(ids) == text
        # The model puts a space in front, and takes it away again.
        assert tokenizer.token_num_bytes()[ids].sum() == len(text.encode()) + 1
    assert not tokenizer.exact
    assert tokenizer.document_start_id == reference.bos_id()
    assert tokenizer.decode([tokenizer.document_start_id, *tokenizer.encode("the cat").tolist()]) == "the cat"
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode("the mat"), tokenizer.encode("the mat"))
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"bad\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
