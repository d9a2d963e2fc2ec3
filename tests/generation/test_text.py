"""Text in, text out: whole characters, stop strings across tokens, and states that stand where the text does."""

import brains
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.sample import Sampling
from neurogen import UserError
from neurogen.data import ByteTokenizer
from neurogen.generation.text import StopMatcher, TextGenerator, Utf8Stream

GREEDY = Sampling(temperature=0.0)


class ScriptedTokenizer:
    """Ids 0 to 9 stand for pieces of bytes that cut characters and words in two; 10 starts a document."""

    vocab_size = 11
    document_start_id = 10
    pieces = (b"a", b"\xc3", b"\xa4", b"st", b"op", b"\xf0\x9f", b"\x98\x80", b"xsto", b"p!", b"\n")

    def encode(self, text):
        return [self.pieces.index(byte) for byte in (bytes([b]) for b in text.encode()) if byte in self.pieces]

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids if i < 10)


def generator(**changes: object) -> TextGenerator:
    tokenizer = ScriptedTokenizer()
    return TextGenerator(brains.small_brain(vocab_size=tokenizer.vocab_size, **changes), tokenizer)


@given(st.text(max_size=20), st.lists(st.integers(0, 60), max_size=8))
def test_cut_bytes_give_whole_characters(text: str, cuts: list[int]) -> None:
    data = text.encode("utf-8", errors="surrogatepass") if text.isascii() else text.encode("utf-8", errors="ignore")
    stream, shown, at = Utf8Stream(), [], 0
    for cut in [*sorted(cuts), len(data)]:
        shown.append(stream.feed(data[at:cut]))
        at = max(at, min(cut, len(data)))
    assert "".join(shown) + stream.flush() == data.decode("utf-8", errors="replace")
    assert not any("\ufffd" in part for part in shown) or "\ufffd" in text


def test_an_unfinished_character_is_held_back_then_marked() -> None:
    stream = Utf8Stream()
    assert stream.feed(b"a\xf0\x9f") == "a"
    assert stream.feed(b"\x98") == ""
    assert stream.feed(b"\x80b") == "\U0001f600b"
    assert stream.feed(b"\xc3") == ""
    assert stream.flush() == "\ufffd"


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 30), max_size=6),
)
def test_text_passes_up_to_the_first_stop_string(text: str, strings: list[str], cuts: list[int]) -> None:
    matcher, shown, met, at = StopMatcher(tuple(strings)), "", False, 0
    for cut in [*sorted(cuts), len(text)]:
        part, met = matcher.feed(text[at:cut])
        at = max(at, min(cut, len(text)))
        shown += part
        if met:
            break
    read = text[:at]
    ends = [read.find(string) for string in strings if string in read]
    assert met == bool(ends)
    if met:
        assert shown == read[: min(ends)]
    else:
        assert shown + matcher.flush() == text


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="stop string is empty"):
        list(generator().stream("a", sampling=GREEDY, stop=["a", ""]))


def test_a_stream_is_the_completion() -> None:
    gen = generator()
    for seed in range(4):
        sampling = Sampling(temperature=1.3)
        pieces = list(gen.stream("aa", sampling=sampling, max_new_tokens=30, chunk_tokens=4, seed=seed, stop=["stop"]))
        (whole,) = gen.complete(["aa"], sampling=sampling, max_new_tokens=30, seed=seed, stop=["stop"])
        assert "".join(piece.text for piece in pieces) == whole.text
        assert pieces[-1].ended == whole.ended
        assert pieces[-1].ids == whole.ids
        assert len(whole.ids) == whole.num_tokens
        assert pieces[-1].log_prob == pytest.approx(whole.log_prob, abs=1e-4)
        assert "stop" not in whole.text


def test_a_stop_string_across_tokens_leaves_the_state_where_the_text_ends() -> None:
    gen = generator()
    for seed in range(40):
        pieces = list(
            gen.stream("a", sampling=Sampling(), max_new_tokens=40, chunk_tokens=16, seed=seed, stop=["stop"])
        )
        ids = pieces[-1].ids
        if pieces[-1].ended == "stop" and ids[-1] != 10 and len(ids) % 16:
            break
    else:
        pytest.fail("no seed stops inside a piece; the test shows nothing")
    row = torch.cat([gen.encode("a"), torch.tensor(ids[:-1])])[None]
    with torch.no_grad():
        expected = gen.model.forward(row).state
    for name, x in expected.tensors().items():
        torch.testing.assert_close(pieces[-1].state.tensors()[name], x, rtol=1e-5, atol=1e-6)


def test_samples_of_a_prompt_differ_and_are_numbered() -> None:
    replies = generator().complete(["a", "aaa"], sampling=Sampling(), max_new_tokens=20, num_samples=3, seed=1)
    assert [(reply.prompt, reply.sample) for reply in replies] == [
        (prompt, sample) for prompt in ("a", "aaa") for sample in range(3)
    ]
    assert len({reply.text for reply in replies}) > 3
    with pytest.raises(UserError, match="num_samples is 0"):
        generator().complete(["a"], sampling=Sampling(), num_samples=0)


def test_prompts_begin_documents_where_the_training_text_did() -> None:
    model = brains.small_brain(vocab_size=257)
    tokenizer = ByteTokenizer()
    assert TextGenerator(model, tokenizer, True).encode("ab").tolist() == [256, 97, 98]
    assert TextGenerator(model, tokenizer, True).encode("").tolist() == [256]
    assert TextGenerator(model, tokenizer, False).encode("").tolist() == [10]
    assert TextGenerator(model, tokenizer, True).encode("ab", new=False).tolist() == [97, 98]
    with pytest.raises(UserError, match="nothing to read"):
        TextGenerator(model, tokenizer, True).encode("", new=False)
