"""Gradients summed over two processes, and the steps that apply them, against one process (gloo, CPU)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import exchange_worker
import pytest
import torch
from exchange_worker import DTYPES, SHAPES, make_params, take_steps
from safetensors.torch import load_file

from neurogen.training import exchange
from neurogen.training.distributed import SINGLE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    path = tmp_path_factory.mktemp("exchange")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    own = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, exchange_worker.__file__, str(path)],
            env={**own, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=100)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_summed_whatever_their_shape(folder: Path, dtype: torch.dtype) -> None:
    """A missing one counts as zero, and nobody waits for it."""
    ours, theirs = (load_file(folder / f"{rank}.{dtype}.safetensors") for rank in (0, 1))
    first, second = (make_params(rank, dtype) for rank in (0, 1))
    assert len(ours) == len(SHAPES)
    for index, (one, other) in enumerate(zip(first, second)):
        zero = torch.zeros_like(one)
        expected = (zero if one.grad is None else one.grad) + (zero if other.grad is None else other.grad)
        assert torch.equal(ours[str(index)], expected.detach()), index
        assert torch.equal(theirs[str(index)], expected.detach()), index
    assert first[-2].grad is not None
    assert second[-2].grad is first[-1].grad is second[-1].grad is None


@pytest.mark.parametrize("num_parts", [1, 2])
def test_two_processes_step_as_one(folder: Path, num_parts: int) -> None:
    """Lanes taken in parts or not, one process without any target in a step; both hold the same bits."""
    ours, theirs = (load_file(folder / f"{rank}.parts{num_parts}.safetensors") for rank in (0, 1))
    alone = take_steps(SINGLE, num_parts=2 * num_parts)
    assert ours.keys() == theirs.keys() == alone.keys()
    for name, tensor in alone.items():
        assert torch.equal(ours[name], theirs[name]), name
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_buckets_hold_neighbours_of_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BUCKET_BYTES", 64)
    sizes = [(10, torch.float32), (6, torch.float32), (1, torch.float32), (20, torch.float32), (2, torch.float64)]
    params = [torch.empty(size, dtype=dtype) for size, dtype in sizes]
    buckets = list(exchange._buckets(params))
    assert [[len(param) for param in bucket] for bucket in buckets] == [[10, 6], [1], [20], [2]]
    assert list(exchange._buckets([])) == []
