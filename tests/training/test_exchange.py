"""Gradients summed over two processes, and the steps that apply them, against one process (gloo, CPU)."""

from pathlib import Path

import exchange_worker
import pytest
import torch
from exchange_worker import DTYPES, SHAPES, make_params, take_steps
from process_pair import free_ports, run_pair
from safetensors.torch import load_file

from neurogen.training import exchange
from neurogen.training.distributed import SINGLE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    path = tmp_path_factory.mktemp("exchange")
    run_pair(Path(exchange_worker.__file__), str(path), environment={"MASTER_PORT": str(free_ports(1)[0])}, timeout=100)
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
