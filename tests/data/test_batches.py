"""Lanes, random windows and the evaluation pass against slow constructions from their definitions."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurogen.data import DataConfig, LaneBatches, RandomBatches, TokenStream, make_batches, validation_batches
from neurogen.data.batches import count_targets, expand, foreign_targets, host_batch
from neurogen.errors import UserError

START = 999


def make_stream(length, *, documents=(0,), start_id=START, name="train"):
    """Token i is i, so a batch shows where it was read; document starts hold the start id."""
    tokens = np.arange(length, dtype=np.uint16)
    if start_id is not None:
        tokens[list(documents)] = start_id
    return TokenStream(tokens, np.array(documents, np.int64), start_id, f"f{length}", name)


def slow_lane(stream, lane, lanes, first, count):
    """(input, target, reset) of `count` tokens of one lane, one token at a time on the ring."""
    length = len(stream)
    rows = []
    for i in range(count):
        at = (first + lane * length // lanes + i) % length
        token = int(stream.tokens[at])
        target = int(stream.tokens[(at + 1) % length])
        if (at + 1) % length == 0 and stream.document_start_id is None:
            target = -100  # the stream's first token does not follow from its last
        rows.append((token, target, at == 0 or token == stream.document_start_id))
    return rows


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(3, 60),
    lanes=st.integers(1, 5),
    window=st.integers(1, 17),
    seed=st.integers(0, 2**64),
    separated=st.booleans(),
)
def test_lanes_read_the_ring_one_token_after_the_other(length, lanes, window, seed, separated):
    if length < lanes * window:
        with pytest.raises(UserError, match=rf"has {length} tokens, but {lanes} lanes of window {window} need"):
            LaneBatches(make_stream(length), lanes=lanes, window=window)
        return
    stream = make_stream(length, documents=(0, length // 2), start_id=None if separated else START)
    batches = LaneBatches(stream, lanes=lanes, window=window, seed=seed)
    num_windows = 2 * length // window + 2
    got = [next(batches) for _ in range(num_windows)]
    inputs = torch.cat([batch.input_ids for batch in got], dim=1)
    targets = torch.cat([batch.target_ids for batch in got], dim=1)
    resets = torch.cat([batch.document_start for batch in got], dim=1)
    turns = [
        turn
        for turn in range(length)
        if all(
            slow_lane(stream, lane, lanes, turn, num_windows * window)
            == list(zip(inputs[lane].tolist(), targets[lane].tolist(), resets[lane].tolist()))
            for lane in range(lanes)
        )
    ]
    assert len(turns) == 1
    assert inputs.dtype == targets.dtype == torch.int64
    assert resets.dtype == torch.bool


def test_an_epoch_reads_every_token_once():
    stream = make_stream(84, start_id=None)
    batches = LaneBatches(stream, lanes=4, window=7, seed=3)
    read = torch.cat([next(batches).input_ids.flatten() for _ in range(3)])
    assert sorted(read.tolist()) == list(range(84))
    assert batches.epoch == 1
    assert LaneBatches(stream, lanes=4, window=7, seed=3).epoch == 0


def test_the_seed_decides_where_lanes_begin():
    stream = make_stream(500)
    first = [next(LaneBatches(stream, lanes=2, window=5, seed=seed)).input_ids for seed in (1, 1, 2)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize("kind", [LaneBatches, RandomBatches])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_out_the_same_lanes(kind, world_size):
    stream = make_stream(301, documents=(0, 17, 100))
    whole = kind(stream, lanes=4, window=9, seed=5)
    ranks = [kind(stream, lanes=4, window=9, seed=5, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(12):
        expected, parts = next(whole), [next(rank) for rank in ranks]
        for field in ("input_ids", "target_ids", "document_start"):
            assert torch.equal(getattr(expected, field), torch.cat([getattr(part, field) for part in parts]))


@pytest.mark.parametrize("kind", [LaneBatches, RandomBatches])
def test_resume_at_every_position_gives_the_same_next_window(kind):
    stream = make_stream(53, documents=(0, 20))
    original = kind(stream, lanes=3, window=5, seed=11)
    expected = [next(original) for _ in range(15)]
    for position in range(14):
        before = kind(stream, lanes=3, window=5, seed=11)
        for _ in range(position):
            next(before)
        after = kind(stream, lanes=3, window=5, seed=11)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert after.epoch == before.epoch
        for step in (position, position + 1) if position < 13 else (position,):
            batch = next(after)
            assert torch.equal(batch.input_ids, expected[step].input_ids)
            assert torch.equal(batch.target_ids, expected[step].target_ids)
            assert torch.equal(batch.document_start, expected[step].document_start)


def test_lanes_resume_with_another_window():
    stream = make_stream(90, start_id=None)
    short = LaneBatches(stream, lanes=2, window=4, seed=1)
    start = next(short).input_ids[:, 0]
    longer = LaneBatches(stream, lanes=2, window=9, seed=1)
    longer.load_state_dict(short.state_dict())
    assert torch.equal(next(longer).input_ids[:, 0], (start + 4) % 90)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lanes": 4}, "lanes"), ({"seed": 2}, "seed"), ({"kind": RandomBatches}, "kind"), ({"length": 91}, "stream")],
)
def test_resume_refuses_another_stream_or_setting(change, named):
    state = LaneBatches(make_stream(90), lanes=2, window=4, seed=1).state_dict()
    settings = {"lanes": 2, "window": 4, "seed": 1} | {k: v for k, v in change.items() if k in ("lanes", "seed")}
    other = change.get("kind", LaneBatches)(make_stream(change.get("length", 90)), **settings)
    with pytest.raises(UserError, match=named):
        other.load_state_dict(state)


def test_random_windows_are_contiguous_fresh_and_spread_out():
    stream = make_stream(200, documents=(0, 150))
    batches = RandomBatches(stream, lanes=8, window=10, seed=0)
    starts = []
    for _ in range(400):
        batch = next(batches)
        assert batch.document_start[:, 0].all()
        assert torch.equal(batch.document_start[:, 1:], batch.input_ids[:, 1:] == START)
        assert torch.equal(batch.input_ids[:, 1:], batch.target_ids[:, :-1])
        plain = (batch.input_ids != START) & (batch.target_ids != START)
        assert torch.equal(batch.target_ids[plain], batch.input_ids[plain] + 1)
        starts += batch.input_ids[:, 0].tolist()
    counts = np.bincount(np.where(np.array(starts) == START, 0, starts), minlength=190)
    # 3200 draws over 190 starts: a Poisson of mean 16.8 leaves 45 and 1 outside any plausible draw.
    assert counts[1:150].min() > 1
    assert counts[1:150].max() < 45
    assert len(counts) == 190  # the last start leaves room for one more target


def test_random_window_of_the_whole_stream():
    batch = next(RandomBatches(make_stream(8), lanes=1, window=7))
    assert batch.input_ids.tolist() == [[START, 1, 2, 3, 4, 5, 6]]
    assert batch.target_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(2, 80),
    lanes=st.integers(1, 7),
    window=st.integers(1, 20),
    max_tokens=st.none() | st.integers(1, 90),
    separated=st.booleans(),
)
def test_evaluation_scores_every_token_but_the_first_once(length, lanes, window, max_tokens, separated):
    stream = make_stream(length, documents=(0, length // 2), start_id=None if separated else START)
    seen = []
    carried = [None] * lanes
    for batch in validation_batches(stream, lanes=lanes, window=window, max_tokens=max_tokens):
        assert batch.input_ids.shape == batch.target_ids.shape == batch.document_start.shape == (lanes, window)
        assert batch.num_targets.tolist() == (batch.target_ids != -100).sum(dim=1).tolist()
        for lane, row in enumerate(batch.target_ids.tolist()):
            for column, target in enumerate(row):
                given_id, reset = int(batch.input_ids[lane, column]), bool(batch.document_start[lane, column])
                if target == -100:
                    assert given_id == 0
                    assert not reset
                    assert -100 in row[column:]
                    continue
                assert carried[lane] in (None, given_id)  # reads on where the lane stopped
                carried[lane] = target
                assert reset == (given_id == stream.document_start_id or (not seen and column == 0))
                seen.append(target)
    count = length - 1 if max_tokens is None else min(max_tokens, length - 1)
    assert sorted(seen) == sorted(stream.tokens[1 : count + 1].tolist())


def test_evaluation_shared_by_ranks():
    stream = make_stream(43)
    whole = list(validation_batches(stream, lanes=4, window=3))
    parts = [list(validation_batches(stream, lanes=4, window=3, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(part) for part in parts] == [len(whole)] * 2
    for index, batch in enumerate(whole):
        assert torch.equal(batch.target_ids, torch.cat([part[index].target_ids for part in parts]))


@pytest.mark.parametrize("make", [LaneBatches, RandomBatches, validation_batches])
@pytest.mark.parametrize(("lanes", "window", "named"), [(0, 4, "lanes"), (2, 0, "window"), (-1, 4, "lanes")])
def test_lanes_and_window_below_one(make, lanes, window, named):
    with pytest.raises(UserError, match=rf"^data\.{named} is (0|-1); it must be at least 1$"):
        make(make_stream(50), lanes=lanes, window=window)


def test_lanes_that_do_not_divide():
    with pytest.raises(UserError, match=r"lanes is 3, which does not divide by 2 ranks"):
        LaneBatches(make_stream(50), lanes=3, window=2, rank=0, world_size=2)


@pytest.mark.parametrize("length", [0, 1])
def test_streams_too_short(length):
    stream = TokenStream(np.zeros(length, np.uint8), np.zeros(0, np.int64), None, "f", "validation")
    for make in (LaneBatches, RandomBatches):
        with pytest.raises(UserError, match=f"the validation stream has {length} tokens"):
            make(stream, lanes=2, window=4)
    with pytest.raises(UserError, match="evaluation needs at least 2"):
        validation_batches(stream, lanes=1, window=1)


def test_evaluation_of_no_tokens():
    with pytest.raises(UserError, match="number of validation tokens is 0"):
        validation_batches(make_stream(9), lanes=1, window=1, max_tokens=0)


def test_config_decides_the_kind():
    stream = make_stream(50)
    assert isinstance(make_batches(stream, DataConfig(lanes=2, window=3), seed=1), LaneBatches)
    random = make_batches(stream, DataConfig(lanes=2, window=3, batching="random"), seed=1)
    assert isinstance(random, RandomBatches)
    assert next(random).input_ids.shape == (2, 3)
    assert next(random).to("cpu").target_ids.shape == (2, 3)


@settings(max_examples=60, deadline=None)
@given(
    lanes=st.integers(1, 4),
    window=st.integers(1, 9),
    seed=st.integers(0, 999),
    start_id=st.sampled_from([None, 3, 999]),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
)
def test_a_window_becomes_the_same_batch_on_the_host_and_on_a_device(lanes, window, seed, start_id, dtype):
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 5, (lanes, window + 3), dtype=dtype)
    marks = rng.random((lanes, window + 3)) < 0.3
    ids, resets = stored[:, 1 : window + 2], marks[:, 1 : window + 2]  # columns of a block, as readers serve them
    targets = [
        [-100 if resets[b, t + 1] and ids[b, t + 1] != start_id else int(ids[b, t + 1]) for t in range(window)]
        for b in range(lanes)
    ]
    on_host = host_batch(ids, resets, start_id)
    on_device = expand(torch.from_numpy(ids), torch.from_numpy(resets), start_id)
    for batch in (on_host, on_device):
        assert batch.input_ids.tolist() == ids[:, :-1].tolist()
        assert batch.target_ids.tolist() == targets
        assert batch.document_start.tolist() == resets[:, :-1].tolist()
        assert batch.input_ids.dtype == batch.target_ids.dtype == torch.int64
        assert all(t.is_contiguous() for t in (batch.input_ids, batch.target_ids, batch.document_start))
    counted = count_targets(ids, foreign_targets(ids, resets, start_id)).tolist()
    assert on_host.num_targets.tolist() == counted == [sum(t != -100 for t in row) for row in targets]
    starts = resets[:, :-1].tolist()
    stored[:], marks[:] = 1, ~marks  # the reader goes on: what was handed out is the batch's own
    assert on_host.target_ids.tolist() == targets
    assert on_host.document_start.tolist() == starts
