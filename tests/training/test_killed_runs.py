"""Whole runs killed in the middle of anything, and started again by the same command: nothing is lost or done twice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import killed_runs
import pytest
import torch

from neurogen.training.checkpoint import load_checkpoint
from neurogen.training.metrics import read_metrics

TIMINGS = ("seconds", "throughput/tokens_per_second", "memory/peak_bytes")
BASE = [
    "experiment=test", "data=text", "data.path=file*.txt", "data.validation_fraction=0.2", "trainer.max_steps=8",
    "trainer.checkpoint_every=2", "trainer.evaluate_every=4", "trainer.evaluate_tokens=64", "trainer.sample_every=0",
    "trainer.sample_prompts=['']", "trainer.sample_tokens=2", "trainer.outlier_sigma=6",
]  # fmt: skip
QUICK = {
    "lanes": ["data.window=64", "trainer.accumulation=2", "data.shuffle=true", "trainer.log_every=3"],
    "bpe": ["data.tokenizer=bpe", "data.vocab_size=280", "data.batching=random", "data.window=64", "optimizer=muon"],
}
RUNS = QUICK | {
    "epoch": ["data.window=64", "trainer.log_every=3"],  # an epoch ends at step 8, intervals across checkpoints
    "accumulated": ["trainer.accumulation=4", "data.shuffle=true", "schedule=wsd"],
    "random": ["data.batching=random", "optimizer=muon", "seed=5"],
    "bpelanes": ["data.tokenizer=bpe", "data.vocab_size=280", "data.window=48", "trainer.accumulation=2"],
}


def kill_runs(folder: Path, name: str, *, num_kills: int, seed: int) -> dict[str, Any]:
    for number in range(6):
        body = "".join(f"def f{number}_{i}(x):\n    return x + {i * number}\n\n" for i in range(12))
        (folder / f"file{number}.txt").write_text(body)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NEUROGEN_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, killed_runs.__file__, str(folder), str(seed), name, str(num_kills)]
    done = subprocess.run([*command, *BASE, *RUNS[name]], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_untouched(folder: Path, name: str, *, num_runs: int) -> None:
    """The killed runs ended with the very bits of the one that was let alone."""
    for number in range(num_runs):
        assert_same(folder / f"{name}_whole", folder / f"{name}_killed{number}")


def assert_same(alone: Path, disturbed: Path) -> None:
    whole, killed = load_checkpoint(alone), load_checkpoint(disturbed)
    assert whole.step == killed.step == 8
    for kind in ("model_tensors", "optimizer_tensors", "state_tensors"):
        ours, theirs = getattr(whole, kind).load(), getattr(killed, kind).load()
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{kind}: {key}"
    for key in ("tokens", "data_position", "rng"):
        assert whole.metadata[key] == killed.metadata[key], key
    rows = [
        [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(run / "metrics.jsonl")]
        for run in (alone, disturbed)
    ]
    assert rows[0] == rows[1]
    assert rows[0][-1]["step"] == 8
    assert json.loads((disturbed / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("name", QUICK)
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    report = kill_runs(tmp_path, name, num_kills=3, seed=sum(map(ord, name)))
    assert len(report["points"]) == 3
    assert report["resumed"] >= 1
    assert_untouched(tmp_path, name, num_runs=report["runs"])
    assert read_metrics(tmp_path / f"{name}_whole/metrics.jsonl")[-1]["data/epoch"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_more_kills(tmp_path: Path) -> None:
    points: list[str] = []
    num_runs = num_resumed = 0
    for seed in range(2):
        for name in RUNS:
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            report = kill_runs(folder, name, num_kills=8, seed=1000 + seed)
            assert_untouched(folder, name, num_runs=report["runs"])
            points += report["points"]
            num_runs += report["runs"]
            num_resumed += report["resumed"]
    print(
        f"{len(points)} kills of {num_runs} runs at {len(set(points))} different points, {num_resumed} starts resumed"
    )
    assert len(points) == 96
    assert len(set(points)) >= 20, points
