"""Steps of two processes recorded as CUDA graphs, exchanges and all, against the same steps launched one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recorded_worker
import torch
from process_pair import free_ports, run_pair
from recorded_worker import CASES, NUM_STEPS
from safetensors.torch import load_file

from neurogen.training.checkpoint import load_checkpoint
from neurogen.training.metrics import read_metrics
from neurogen.training.recorded import NUM_PLAIN_STEPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(560),  # kernels compile
]
NUM_UNUSUAL = 3  # steps of recorded_worker.make_batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote of all cases."""
    path = tmp_path_factory.mktemp("recorded")
    script = Path(recorded_worker.__file__)
    run_pair(script, str(path), environment={"MASTER_PORT": str(free_ports(1)[0])}, timeout=500)
    return path


@pytest.mark.parametrize("name", CASES)
def test_recorded_steps_of_two_are_plain_steps_bit_for_bit(folder: Path, name: str) -> None:
    """A sum of two has no order, so plain and recorded exchanges agree to the bit, and so do the ranks."""
    found = {
        (rank, kind): load_file(folder / f"{rank}.{name}.{kind}.safetensors")
        for rank in (0, 1)
        for kind in ("plain", "recorded")
    }
    expected = found[0, "plain"]
    assert bool(expected["losses"].isfinite().all())
    for (rank, kind), tensors in found.items():
        taken = NUM_STEPS if kind == "plain" else NUM_PLAIN_STEPS + 1 + NUM_UNUSUAL
        assert int(tensors.pop("num_calls")) == taken, (rank, kind)
        for key, tensor in tensors.items():
            assert torch.equal(tensor, expected[key]), (rank, kind, key)


def test_a_recorded_run_of_two_ends_and_saves_what_a_plain_one_does(tmp_path: Path) -> None:
    """The whole trainer: recordings are gone before the processes part, which NCCL would wait for otherwise."""
    (tmp_path / "notes.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(400)))
    words = [
        "experiment=test", "trainer.distributed=ddp", "trainer.device=cuda", "trainer.dtype=bfloat16", "mode=fused",
        "model.embedding_dim=64", "model.column_width=32", "model.head_width=32", "model.chunk_size=16",
        "data=text", "data.path=notes.txt", "data.validation_fraction=0.2", "trainer.max_steps=16",
        "trainer.log_every=4", "trainer.evaluate_every=8", "trainer.sample_every=0", "trainer.checkpoint_every=0",
    ]  # fmt: skip
    for name in ("plain", "recorded"):
        more = [f"trainer.cuda_graph={str(name == 'recorded').lower()}", f"run_dir={name}"]
        (tmp_path / f"{name}.json").write_text(json.dumps([*words, *more]))
    jobs = [f"{port}:{name}" for port, name in zip(free_ports(2), ("plain", "recorded"))]
    environment = {"NEUROGEN_CACHE": str(tmp_path / "cache")}
    script = Path(recorded_worker.__file__).with_name("distributed_worker.py")
    said = run_pair(script, str(tmp_path), *jobs, environment=environment, timeout=500)
    outcomes = {path.name: path.read_text() for path in tmp_path.glob("*.outcome")}
    assert len(outcomes) == 4
    assert set(outcomes.values()) == {"code 0"}, "\n".join([*said, *outcomes.values()])
    plain, recorded = (load_checkpoint(tmp_path / name) for name in ("plain", "recorded"))
    for kind in ("model_tensors", "optimizer_tensors", "state_tensors"):
        left, right = getattr(plain, kind).load(), getattr(recorded, kind).load()
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), f"{kind}: {name}"
    losses = [[row.get("train/loss") for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in (
        "plain", "recorded",
    )]  # fmt: skip
    assert losses[0] == losses[1]
