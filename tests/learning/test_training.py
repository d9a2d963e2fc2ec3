"""Whole runs with the local rule."""

from pathlib import Path

import pytest

from neurogen.config.compose import compose_config
from neurogen.training.checkpoint import load_checkpoint
from neurogen.training.metrics import read_metrics
from neurogen.training.run import train


def test_a_local_run_learns_and_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEUROGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("neurogen.training.recorder.plot_run", lambda path: [])
    for number in range(6):
        (tmp_path / f"file{number}.txt").write_text(f"a line of file {number}\n" * 20)
    command = ["experiment=test", "data=text", "data.path=file*.txt", "data.validation_fraction=0.2", "learning=local"]
    command += ["learning.dopamine=0.5", "learning.feedback=random", "data.window=8", "trainer.accumulation=2"]
    command += ["trainer.max_steps=6", "trainer.evaluate_every=0", "trainer.sample_every=0", "trainer.sample_tokens=2"]
    command += ["trainer.checkpoint_every=0", "trainer.log_every=1"]
    train(compose_config([*command, "run_dir=whole"]))
    train(compose_config([*command, "run_dir=parts", "trainer.stop_at_step=3"]))
    train(compose_config([*command, "resume=parts"]))
    whole, parts = (read_metrics(f"{run}/metrics.jsonl") for run in ("whole", "parts"))
    for key in ("train/loss", "train/grad_norm", "health/wernicke/firing_rate"):
        assert [row[key] for row in whole] == [row[key] for row in parts]
    assert whole[-1]["train/loss"] < whole[0]["train/loss"]
    ours, theirs = (load_checkpoint(run).state_tensors.load() for run in ("whole", "parts"))
    assert float(ours["learning/num_predicted"]) > 0
    assert ours["learning/predicted_loss"].equal(theirs["learning/predicted_loss"])
