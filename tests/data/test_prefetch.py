"""Batches ahead of time: the same ones, the reader's position, and failures that arrive."""

import threading
import time

import numpy as np
import pytest
import torch

from neurogen.data import LaneBatches, RandomBatches, TokenStream
from neurogen.data.prefetch import Prefetcher
from neurogen.errors import UserError


def make(kind=LaneBatches, seed=1):
    tokens = np.arange(500, dtype=np.uint16)
    tokens[[0, 100, 101, 350]] = 9999
    return kind(TokenStream(tokens, np.array([0, 100, 101, 350]), 9999, "f", "train"), lanes=3, window=7, seed=seed)


def equal(a, b):
    fields = ("input_ids", "target_ids", "document_start")
    return all(torch.equal(getattr(a, field).cpu(), getattr(b, field)) for field in fields)


def make_separated():
    """No document starts: the ring's seam is no target."""
    stream = TokenStream(np.arange(50, dtype=np.uint8), np.zeros(1, np.int64), None, "f", "train")
    return LaneBatches(stream, lanes=3, window=7)


def test_targets_are_counted_on_the_host():
    with Prefetcher(make_separated(), "cpu") as ahead:
        counts = []
        for direct, _ in zip(make_separated(), range(30)):
            batch = next(ahead)
            expected = (direct.target_ids != -100).sum(dim=1).tolist()
            assert direct.num_targets.tolist() == direct.to("cpu").num_targets.tolist() == expected
            assert batch.num_targets.tolist() == expected
            counts += expected
    assert set(counts) == {6, 7}


def check(device, kind, depth):
    expected = make(kind)
    with Prefetcher(make(kind), device, depth=depth) as batches:
        for _ in range(60):
            batch = next(batches)
            assert batch.input_ids.device.type == device
            assert equal(batch, next(expected))
            assert batches.state_dict() == expected.state_dict()
            assert batches.epoch == expected.epoch
            assert batch.num_targets.tolist() == (batch.target_ids != -100).sum(dim=1).tolist()
        assert batches.num_batches == 60


@pytest.mark.parametrize("kind", [LaneBatches, RandomBatches])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_same_batches_and_the_readers_position(kind, depth):
    check("cpu", kind, depth)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", [LaneBatches, RandomBatches])
def test_the_same_batches_on_a_gpu(kind):
    check("cuda", kind, 2)
    with Prefetcher(make(kind), "cuda") as batches:
        for _ in range(20):
            next(batches)
        torch.cuda.synchronize()
        assert 0 <= batches.wait_seconds < 10
        assert not batches._gpu_waits


def test_resume_from_a_position():
    expected = make()
    states = []
    for _ in range(5):
        states.append(expected.state_dict())
        last = next(expected)
    with Prefetcher(make(), "cpu") as batches:
        next(batches)
        batches.load_state_dict(states[4])
        assert equal(next(batches), last)
        with pytest.raises(UserError, match="seed"):
            batches.load_state_dict({**states[0], "seed": 2})


def test_stalls_are_counted():
    class Slow(LaneBatches):
        def next_window(self):
            time.sleep(0.03)
            return super().next_window()

    slow = Slow(make().stream, lanes=3, window=7)
    with Prefetcher(slow, "cpu") as batches:
        for _ in range(5):
            next(batches)
        assert batches.num_stalls == 4  # the first batch is never ready
        assert batches.wait_seconds > 0.1
    with Prefetcher(make(), "cpu") as batches:
        for _ in range(5):
            time.sleep(0.05)
            next(batches)
        assert batches.num_stalls == 0


def test_what_the_gpu_waits_is_added_once_it_is_known():
    class Event:
        def __init__(self, at, done):
            self.at, self.done = at, done

        def query(self):
            return self.done

        def elapsed_time(self, later):
            return later.at - self.at  # milliseconds

    with Prefetcher(make(), "cpu") as batches:
        on_host = batches.wait_seconds
        late = Event(900.0, False)
        batches._gpu_waits.extend([(Event(0.0, True), Event(250.0, True)), (Event(300.0, True), late)])
        assert batches.wait_seconds - on_host == pytest.approx(0.25)
        late.done = True
        assert batches.wait_seconds - on_host == pytest.approx(0.85)
        assert batches.wait_seconds - on_host == pytest.approx(0.85)


def test_a_failure_in_the_thread_reaches_the_reader():
    class Failing(LaneBatches):
        def next_window(self):
            if self.position > 20:
                raise UserError("the disk is gone")
            return super().next_window()

    batches = Prefetcher(Failing(make().stream, lanes=3, window=7), "cpu")
    for _ in range(3):
        next(batches)
    for _ in range(2):
        with pytest.raises(UserError, match="the disk is gone"):
            next(batches)


def test_closing_ends_the_thread():
    before = threading.active_count()
    batches = Prefetcher(make(), "cpu", depth=1)
    next(batches)
    batches.close()
    batches.close()
    assert threading.active_count() == before
