"""Prompts of any lengths, groups, pieces and continuation: a lane says the same however it is run."""

import brains
import pytest
import torch

from kernels.sample import Sampling
from neurogen import BrainState, NeuroGen, UserError
from neurogen.generation import prompts as prompts_module
from neurogen.generation.prompts import generate_prompts, read_all_but_last

LENGTHS = [5, 1, 9, 2, 5]
SETTINGS = {"temperature": 0.9, "top_k": 30, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def model() -> NeuroGen:
    return brains.small_brain(memory_rule="delta")


def assert_states_close(a: BrainState, b: BrainState) -> None:
    for name, x in b.tensors().items():
        torch.testing.assert_close(a.tensors()[name], x, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("carried", [False, True])
def test_reading_together_is_reading_alone(model: NeuroGen, carried: bool) -> None:
    rows = [torch.tensor(prompt) for prompt in brains.random_prompts(LENGTHS)]
    past = model.forward(torch.tensor(brains.random_prompts([4] * 5, seed=8))).state if carried else None
    together = read_all_but_last(model, rows, past)
    for lane, row in enumerate(rows):
        before = model.init_state(1) if past is None else past.select([lane])
        alone = model.forward(row[None, :-1], before).state if len(row) > 1 else before
        assert_states_close(together.select([lane]), alone)


def test_windows_change_nothing(model: NeuroGen, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [torch.tensor(prompt) for prompt in brains.random_prompts(LENGTHS)]
    whole = read_all_but_last(model, rows, None)
    monkeypatch.setattr(prompts_module, "PREFILL_WINDOW", 3)
    assert_states_close(read_all_but_last(model, rows, None), whole)


@pytest.mark.parametrize("mode", ["naive", "pointer", "preallocated", "unfused"])
def test_a_lane_does_not_depend_on_its_neighbours(mode: str) -> None:
    model = brains.small_brain(mode=mode)
    prompts = brains.random_prompts(LENGTHS)
    together = model.generate(prompts, max_new_tokens=8, seed=3, **SETTINGS)
    for lane, prompt in enumerate(prompts):
        alone = generate_prompts(
            model, [prompt], max_new_tokens=8, sampling=Sampling(**SETTINGS), seed=3, lanes=torch.tensor([lane])
        )
        assert alone.tokens[0].tolist() == together.tokens[lane].tolist()
        assert_states_close(alone.state, together.state.select([lane]))


def test_lanes_of_one_prompt_differ_and_seeds_differ(model: NeuroGen) -> None:
    prompts = brains.random_prompts([4]) * 3
    first = model.generate(prompts, max_new_tokens=12, seed=3)
    assert len({tuple(row) for row in first.tokens.tolist()}) == 3
    assert torch.equal(model.generate(prompts, max_new_tokens=12, seed=3).tokens, first.tokens)
    assert not torch.equal(model.generate(prompts, max_new_tokens=12, seed=4).tokens, first.tokens)


def test_more_lanes_than_a_group_holds(model: NeuroGen, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = brains.random_prompts([3, 7, 1, 2, 2, 6, 4])
    whole = model.generate(prompts, max_new_tokens=6, seed=1, **SETTINGS)
    monkeypatch.setattr(prompts_module, "GROUP_LANES", 3)
    groups = generate_prompts(model, prompts, max_new_tokens=6, sampling=Sampling(**SETTINGS), seed=1)
    assert torch.equal(groups.tokens, whole.tokens)
    assert_states_close(groups.state, whole.state)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 50])
def test_pieces_are_the_whole(model: NeuroGen, chunk_tokens: int) -> None:
    prompts = brains.random_prompts(LENGTHS)
    stop = list(range(8))
    whole = model.generate(prompts, max_new_tokens=10, seed=2, stop=stop, **SETTINGS)
    assert len(set(whole.lengths.tolist())) > 1
    pieces = list(
        model.generate_stream(prompts, max_new_tokens=10, chunk_tokens=chunk_tokens, seed=2, stop=stop, **SETTINGS)
    )
    replies = [[token for piece in pieces for token in piece.replies()[lane]] for lane in range(len(prompts))]
    assert replies == whole.replies()
    assert torch.equal(sum(piece.lengths for piece in pieces), whole.lengths)
    log_probs = torch.stack([sum(piece.log_probs[lane].sum() for piece in pieces) for lane in range(len(prompts))])
    torch.testing.assert_close(log_probs, whole.log_probs.sum(1))
    assert_states_close(pieces[-1].state, whole.state)


@pytest.mark.parametrize("mode", ["naive", "preallocated", "unfused"])
def test_ten_and_ten_are_twenty(mode: str) -> None:
    model = brains.small_brain(mode=mode)
    prompts = brains.random_prompts([4, 6])
    twenty = model.generate(prompts, max_new_tokens=20, seed=6)
    ten = model.generate(prompts, max_new_tokens=10, seed=6)
    more = model.generate(ten.last_tokens(), max_new_tokens=10, seed=6, state=ten.state)
    assert torch.equal(torch.cat([ten.tokens, more.tokens], 1), twenty.tokens)
    assert_states_close(more.state, twenty.state)


def test_going_on_with_a_penalty_needs_what_was_seen(model: NeuroGen) -> None:
    prompts = brains.random_prompts([4])
    twenty = model.generate(prompts, max_new_tokens=20, seed=6, repetition_penalty=1.5)
    ten = model.generate(prompts, max_new_tokens=10, seed=6, repetition_penalty=1.5)
    seen = torch.zeros(1, model.vocab_size, dtype=torch.bool)
    seen[0, prompts[0]] = True
    seen[0, ten.tokens[0]] = True
    more = model.generate(
        ten.last_tokens(), max_new_tokens=10, seed=6, repetition_penalty=1.5, state=ten.state, seen=seen
    )
    assert torch.equal(more.tokens, twenty.tokens[:, 10:])


def test_a_stop_id_ends_its_lane_alone(model: NeuroGen) -> None:
    free = model.generate(brains.random_prompts(LENGTHS), max_new_tokens=12, seed=2)
    stop = int(free.tokens[0, 4])
    ended = model.generate(brains.random_prompts(LENGTHS), max_new_tokens=12, seed=2, stop=[stop])
    for lane, row in enumerate(free.tokens.tolist()):
        expected = row[: row.index(stop) + 1] if stop in row else row
        assert ended.replies()[lane] == expected
        assert int(ended.lengths[lane]) == len(expected)
        assert set(ended.tokens[lane, len(expected) :].tolist()) <= {stop}
        assert not ended.log_probs[lane, len(expected) :].any()


def test_log_probs_are_the_models_own(model: NeuroGen) -> None:
    prompts = brains.random_prompts([5])
    reply = model.generate(prompts, max_new_tokens=9, seed=2, temperature=0.5, top_p=0.7)
    ids = torch.cat([torch.tensor(prompts), reply.tokens], 1)
    with torch.no_grad():
        log_probs = model.forward(ids[:, :-1]).logits.log_softmax(-1)[:, -9:]
    torch.testing.assert_close(reply.log_probs, log_probs.gather(-1, reply.tokens[..., None])[..., 0])


def test_the_state_stays_as_large_as_it_is(model: NeuroGen) -> None:
    sizes = {model.generate([[1, 2]], max_new_tokens=n, seed=1).state.num_bytes for n in (1, 7, 40)}
    assert sizes == {model.init_state(1).num_bytes}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": [[1, 41]]}, "token id 41; the vocabulary is 0..40"),
        ({"input_ids": [[-1]]}, "token id -1"),
        ({"input_ids": [[1], []]}, "prompt 1 has shape"),
        ({"input_ids": []}, "there is no prompt"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
        ({"input_ids": [[0.5]]}, "token ids are integers"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"stop": [99]}, "stop has token id 99"),
        ({"seen": torch.zeros(2, 41, dtype=torch.bool)}, "seen is for 2 lanes"),
    ],
)
def test_errors_are_one_line(model: NeuroGen, arguments: dict, words: str) -> None:
    call = {"input_ids": [[1, 2, 3]], "max_new_tokens": 4, **arguments}
    with pytest.raises(UserError, match=words) as error:
        model.generate(**call)
    assert "\n" not in str(error.value)


def test_a_state_that_does_not_fit_is_named(model: NeuroGen) -> None:
    with pytest.raises(UserError, match="state is for 3 lanes"):
        model.generate([[1], [2]], max_new_tokens=2, state=model.init_state(3))
    with pytest.raises(UserError, match="shape"):
        model.generate([[1], [2]], max_new_tokens=2, state=brains.small_brain(embedding_dim=64).init_state(2))


def test_a_stream_checks_before_its_first_piece(model: NeuroGen) -> None:
    with pytest.raises(UserError, match="token id 41"):
        model.generate_stream([[41]], max_new_tokens=4)
    with pytest.raises(UserError, match="chunk_tokens is 0"):
        model.generate_stream([[4]], max_new_tokens=4, chunk_tokens=0)
