"""Every mode draws the same tokens from the same seed, stops alike and leaves the same state."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from neurogen import NeuroGen, UserError
from neurogen.generation import Generation

TOKEN_MODES = ("naive", "pointer", "preallocated")
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "plain": {},
    "filters": {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    "penalty": {"repetition_penalty": 1.5, "temperature": 1.2},
    "greedy-penalty": {"do_sample": False, "repetition_penalty": 2.0},
    "top-k-of-more-than-there-are": {"top_k": 99, "min_p": 0.2},
}


def prompt(lanes: int = 3, num_tokens: int = 4) -> torch.Tensor:
    return torch.randint(11, (lanes, num_tokens), generator=torch.Generator().manual_seed(7))


def assert_same(got: Generation, expected: Generation) -> None:
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.lengths, expected.lengths)
    torch.testing.assert_close(got.log_probs, expected.log_probs, rtol=0, atol=1e-5)
    reference = expected.state.tensors()
    for name, x in got.state.tensors().items():
        torch.testing.assert_close(x, reference[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_same_tokens_in_every_mode(name: str, make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(
        memory_rule="delta" if name == "filters" else "hebbian", token_shift=3 if name == "penalty" else 0
    )
    settings = SAMPLINGS[name] | {"max_new_tokens": 9, "seed": 2**40 + 5, "stop": (3,)}
    expected = model.generate(prompt(), **settings)
    assert len(set(expected.tokens.flatten().tolist())) > 1
    for mode in TOKEN_MODES:
        model.set_mode(mode)
        assert_same(model.generate(prompt(), **settings), expected)


@pytest.mark.parametrize("mode", ["unfused", *TOKEN_MODES])
def test_continues_from_a_state(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    """A reply in two calls is the reply in one: the state carries everything, the position of the draws included."""
    model = make_model(mode=mode)
    whole = model.generate(prompt(), max_new_tokens=8, seed=1)
    first = model.generate(prompt(), max_new_tokens=3, seed=1)
    second = model.generate(first.tokens[:, -1:], max_new_tokens=5, seed=1, state=first.state)
    assert torch.equal(torch.cat([first.tokens, second.tokens], 1), whole.tokens)
    assert torch.equal(second.state.position, whole.state.position)


@pytest.mark.parametrize("mode", ["unfused", *TOKEN_MODES])
def test_a_lane_that_stops(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    """Its row is filled with the stop token, its log-probabilities with 0, and its state stays where it stopped,
    however long the others go on."""
    model = make_model(mode=mode)
    free = model.generate(prompt(), max_new_tokens=10, seed=3)
    stop = int(free.tokens[0, 2])
    assert stop not in free.tokens[0, :2].tolist()
    out = model.generate(prompt(), max_new_tokens=10, seed=3, stop=(stop,))
    assert out.tokens.shape == (3, 10)
    assert int(out.lengths[0]) == 3
    assert torch.equal(out.tokens[0], torch.cat([free.tokens[0, :3], torch.full((7,), stop)]))
    assert not out.log_probs[0, 3:].any()
    assert out.replies()[0] == free.tokens[0, :3].tolist()
    # The lane alone, asked for exactly those tokens, ends in the same state.
    alone = model.generate(prompt()[:1], max_new_tokens=3, seed=3)
    for name, x in out.state.select([0]).tensors().items():
        torch.testing.assert_close(x, alone.state.tensors()[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("mode", ["unfused", *TOKEN_MODES])
def test_all_lanes_stopping_ends_the_loop(
    mode: str, make_model: Callable[..., NeuroGen], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(mode=mode)
    stops = tuple(range(model.vocab_size))
    out = model.generate(prompt(), max_new_tokens=200_000, stop=stops)
    assert out.lengths.tolist() == [1, 1, 1]
    assert out.tokens.shape == (3, 200_000)


@pytest.mark.parametrize("mode", ["unfused", *TOKEN_MODES])
def test_one_token_after_one_token(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    out = make_model(mode=mode).generate(prompt(1, 1), max_new_tokens=1, do_sample=False)
    expected = make_model()(prompt(1, 1)).logits[0, -1].argmax()
    assert out.tokens.tolist() == [[int(expected)]]
    assert out.state.position.tolist() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.tensor([[0, 11]])}, "token id 11; the vocabulary is 0..10"),
        ({"input_ids": torch.tensor([[-1]])}, "token id -1"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "at least one token"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64)}, "at least one token"),
        ({"input_ids": torch.zeros(1, 2)}, "token ids are integers"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"stop": (11,)}, "stop has token id 11"),
    ],
)
def test_refuses_what_cannot_be(change: dict[str, Any], message: str, make_model: Callable[..., NeuroGen]) -> None:
    settings: dict[str, Any] = {"input_ids": prompt(), "max_new_tokens": 2} | change
    with pytest.raises(UserError, match=message):
        make_model().generate(settings.pop("input_ids"), **settings)


def test_refuses_a_state_of_other_lanes(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model()
    with pytest.raises(UserError, match="the state has 2 lanes and the prompt 3"):
        model.generate(prompt(), max_new_tokens=2, state=model.init_state(2))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLINGS)
def test_same_tokens_on_gpu(name: str, make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(dtype=torch.float32)
    settings = SAMPLINGS[name] | {"max_new_tokens": 20, "seed": 5, "stop": (3,)}
    expected = model.generate(prompt(), **settings).tokens
    model.to("cuda")
    for mode in ("unfused", *TOKEN_MODES):
        model.set_mode(mode)
        assert torch.equal(model.generate(prompt(), **settings).tokens.cpu(), expected), mode
