"""Shuffled lanes: what an epoch reads, seen from outside."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurogen.data import TokenStream
from neurogen.data import batches as batches_module
from neurogen.data.shards import ShardedTokens, ShardStream
from neurogen.data.shuffle import ShuffledLaneBatches
from neurogen.data.stream import windows_of
from neurogen.errors import UserError

START = 60000


def make_stream(*shards):
    """Shards of documents of the given lengths (start id included); other ids are all different."""
    parts, number = [], 0
    for index, lengths in enumerate(shards):
        offsets = np.cumsum([0, *lengths])
        tokens = np.arange(number, number + offsets[-1], dtype=np.uint16)
        tokens[offsets[:-1]] = START
        parts.append(TokenStream(tokens, offsets[:-1], START, str(index)))
        number += len(tokens)
    joined = ShardedTokens([part.tokens for part in parts])
    return ShardStream(joined, np.array([], np.int64), START, "f", "train", tuple(parts))


def documents(tokens):
    starts = np.flatnonzero(np.asarray(tokens) == START)
    assert starts[0] == 0
    return [tuple(part.tolist()) for part in np.split(np.asarray(tokens), starts[1:])]


def read_lanes(stream, num_tokens, **kwargs):
    """ids, targets, resets of each lane, num_tokens of them."""
    batches = ShuffledLaneBatches(stream, **kwargs)
    got = [next(batches) for _ in range(-(-num_tokens // batches.window))]
    return [
        torch.cat([getattr(batch, field) for batch in got], dim=1)[:, :num_tokens].numpy()
        for field in ("input_ids", "target_ids", "document_start")
    ]


def epochs_of(stream, num_epochs, lanes, **kwargs):
    """The line of each epoch, put together from the ranges of its lanes."""
    total = len(stream)
    bounds = [lane * total // lanes for lane in range(lanes + 1)]
    sizes = np.diff(bounds)
    ids, targets, resets = read_lanes(stream, num_epochs * sizes.max() + 1, lanes=lanes, **kwargs)
    for lane, size in enumerate(sizes):
        for at in range(ids.shape[1] - 1):
            seam = (at + 1) % size == 0
            follows = ids[lane, at + 1]
            assert targets[lane, at] == (-100 if seam and follows != START else follows)
            assert resets[lane, at] == (at % size == 0 or ids[lane, at] == START)
    return [
        np.concatenate([ids[lane, epoch * size : (epoch + 1) * size] for lane, size in enumerate(sizes)])
        for epoch in range(num_epochs)
    ]


@settings(max_examples=25, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=4),
    lanes=st.integers(1, 4),
    window=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_each_epoch_reads_every_document_once_and_whole(shards, lanes, window, seed):
    stream = make_stream(*shards)
    if len(stream) < lanes * window:
        with pytest.raises(UserError, match="tokens, but"):
            ShuffledLaneBatches(stream, lanes=lanes, window=window)
        return
    by_shard = [documents(part.tokens) for part in stream.parts]
    everything = sorted(document for shard in by_shard for document in shard)
    for line in epochs_of(stream, 3, lanes, window=window, seed=seed):
        read = documents(line)
        assert sorted(read) == everything
        long_enough = [document for document in read if len(document) > 1]  # those of one token are all alike
        homes = [next(i for i, shard in enumerate(by_shard) if document in shard) for document in long_enough]
        changes = sum(a != b for a, b in itertools.pairwise(homes))
        assert changes <= len(set(homes)) - 1 if homes else True  # a shard is read from end to end


def test_seed_and_epoch_change_the_order():
    stream = make_stream([3] * 12, [4] * 12)
    first, second = epochs_of(stream, 2, 3, window=4, seed=1)
    (other,) = epochs_of(stream, 1, 3, window=4, seed=2)
    (same,) = epochs_of(stream, 1, 3, window=4, seed=1)
    assert first.tolist() == same.tolist()
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()


def test_all_orders_of_three_documents_occur_evenly():
    stream = make_stream([2, 2, 2])
    orders = [tuple(line.tolist()) for line in epochs_of(stream, 600, 1, window=6, seed=4)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert min(counts) > 60  # mean 100, standard deviation 9
    assert max(counts) < 140


@pytest.mark.parametrize("block", [1, 40])
def test_resume_anywhere_and_any_ranks_read_the_same(monkeypatch, block):
    monkeypatch.setattr(batches_module, "BLOCK_TOKENS", block)
    stream = make_stream([5, 9, 2, 7], [30], [1, 1, 1, 8, 4])
    kwargs = {"lanes": 4, "window": 5, "seed": 8}
    whole = ShuffledLaneBatches(stream, **kwargs)
    for _ in range(25):
        state = json.loads(json.dumps(whole.state_dict()))
        expected = next(whole)
        for world_size in (1, 2, 4):
            parts = []
            for rank in range(world_size):
                batches = ShuffledLaneBatches(stream, rank=rank, world_size=world_size, **kwargs)
                batches.load_state_dict(state)
                parts.append(next(batches))
            for field in ("input_ids", "target_ids", "document_start"):
                assert torch.equal(getattr(expected, field), torch.cat([getattr(part, field) for part in parts]))


def test_streams_without_document_starts():
    stream = TokenStream(np.zeros(50, np.uint8), np.zeros(1, np.int64), None, "f", "train")
    with pytest.raises(UserError, match=r"no document starts to shuffle at; set data\.shuffle=false"):
        ShuffledLaneBatches(stream, lanes=1, window=4)


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5), data=st.data())
def test_sharded_tokens_slice_like_one_array(lengths, data):
    arrays = [np.arange(10 * i, 10 * i + n, dtype=np.uint8) for i, n in enumerate(lengths)]
    joined = np.concatenate(arrays)
    tokens = ShardedTokens(arrays, dtype=np.dtype(np.uint16))
    assert len(tokens) == len(joined)
    start = data.draw(st.integers(0, len(joined)))
    stop = data.draw(st.integers(0, len(joined) + 3))
    np.testing.assert_array_equal(tokens[start:stop], joined[start:stop])
    assert tokens[start:stop].dtype == np.uint16


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), length=st.integers(1, 6), data=st.data())
def test_windows_are_slices_whatever_files_they_lie_in(lengths, length, data):
    arrays = [np.arange(10 * i, 10 * i + n, dtype=np.uint8) for i, n in enumerate(lengths)]
    joined = np.concatenate(arrays)
    if len(joined) < length:
        return
    starts = np.array(data.draw(st.lists(st.integers(0, len(joined) - length), min_size=1, max_size=8)), np.int64)
    expected = [joined[start : start + length].tolist() for start in starts]
    nested = ShardedTokens([ShardedTokens(arrays), joined], dtype=np.dtype(np.uint16))
    for tokens in (joined, ShardedTokens(arrays), nested):
        windows = windows_of(tokens, starts, length)
        assert windows.tolist() == expected
        assert windows.dtype == tokens.dtype
