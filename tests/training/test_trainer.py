"""Whole runs: what they leave, how they end, and that a stop in the middle leaves no trace."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from neurogen.config.compose import compose_config
from neurogen.config.schema import Config, ModeConfig
from neurogen.data import BpeTokenizer
from neurogen.data.prefetch import Prefetcher
from neurogen.errors import UserError
from neurogen.training.checkpoint import list_checkpoints, load_checkpoint
from neurogen.training.metrics import read_metrics
from neurogen.training.run import train
from neurogen.training.trained import load_trained

ROOT = Path(__file__).resolve().parents[2]
BASE = ["experiment=test", "data=text", "data.path=file*.txt", "data.validation_fraction=0.2"]
QUICK = ["trainer.checkpoint_every=0", "trainer.evaluate_tokens=64"]
QUICK += ["trainer.sample_prompts=['']", "trainer.sample_tokens=2"]
TIMINGS = ("seconds", "throughput/tokens_per_second", "throughput/mfu", "memory/peak_bytes")
TIMINGS += ("data/stalls", "data/wait_seconds", "data/wait_share")


@pytest.fixture
def plots() -> bool:
    return False


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plots: bool) -> Path:
    """A small corpus, with the run's cache beside it. Plots take longer than these runs: one test draws them."""
    if not plots:
        monkeypatch.setattr("neurogen.training.recorder.plot_run", lambda path: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEUROGEN_CACHE", str(tmp_path / "cache"))
    for number in range(6):
        body = "".join(f"def f{number}_{i}(x):\n    return x + {i * number}\n\n" for i in range(12))
        (tmp_path / f"file{number}.txt").write_text(body)
    return tmp_path


def configure(*overrides: str) -> Config:
    return compose_config([*BASE, *QUICK, *overrides])


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in read_metrics(path)]


@pytest.mark.parametrize("plots", [True])
def test_a_run_leaves_everything(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(configure("run_dir=runs/a", "trainer.checkpoint_every=4", "trainer.health_plots=true")) == 0
    run = text / "runs" / "a"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all({"step", "tokens", "seconds", "train/loss", "train/grad_norm"} <= row.keys() for row in rows)
    assert [row["tokens"] for row in rows] == [64 * step for step in range(1, 9)]
    last = rows[-1]
    measures = ("loss", "bpb", "perplexity", "accuracy")
    wanted = {f"{prefix}/{name}" for prefix in ("val", "val_reset") for name in measures}
    wanted |= {"throughput/tokens_per_second", "memory/peak_bytes", "train/learning_rate", "train/skipped_steps"}
    wanted |= {"health/wernicke/firing_rate", "health/broca/firing_rate"}
    assert wanted <= last.keys()
    assert rows[0]["train/loss"] == pytest.approx(math.log(257), abs=0.05)
    assert last["train/loss"] < rows[0]["train/loss"]
    assert last["val/loss"] == pytest.approx(last["val/bpb"] * math.log(2), rel=0.2)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["tokens"]) == ("finished", 8, 512)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000004", "step-00000008"]
    assert {path.name for path in (run / "samples").iterdir()} == {"step-00000004.txt", "step-00000008.txt"}
    plots = {path.stem for path in (run / "plots").glob("*.png")}
    assert {"loss", "bits_per_byte", "firing_rates", "spikes", "workspace", "memory_horizon", "gradient_lag"} <= plots
    assert json.loads((run / "plots" / "health.json").read_text())["half_lives"]["pfc.0"][2] > 1000
    assert "finished at step 8" in capsys.readouterr().err


def test_the_seed_decides_everything(text: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(configure(f"run_dir={name}", f"seed={seed}", "trainer.max_steps=3"))
    assert untimed(text / "a/metrics.jsonl") == untimed(text / "b/metrics.jsonl")
    assert untimed(text / "a/metrics.jsonl") != untimed(text / "c/metrics.jsonl")


def assert_same_end(whole_run: Path, resumed_run: Path) -> None:
    """Both runs ended with the same bits in everything, and say the same of each step but for the time it took."""
    whole, resumed = load_checkpoint(whole_run), load_checkpoint(resumed_run)
    assert whole.step == resumed.step
    for kind in ("model_tensors", "optimizer_tensors", "state_tensors"):
        ours, theirs = getattr(whole, kind).load(), getattr(resumed, kind).load()
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{kind}: {key}"
    for key in ("tokens", "data_position", "rng"):
        assert whole.metadata[key] == resumed.metadata[key]
    assert untimed(whole_run / "metrics.jsonl") == untimed(resumed_run / "metrics.jsonl")


EXACT = {
    "lanes": ["trainer.log_every=4"],  # stopped inside a logging interval
    "random windows": ["data.batching=random", "optimizer=muon", "schedule=wsd"],
    "accumulated, shuffled": ["trainer.accumulation=2", "data.shuffle=true"],
    "dropout, tried before": ["model.dropout=0.3", "trainer.dry_run=true", "trainer.sample_every=2"],
    "bpe across an epoch": ["data.tokenizer=bpe", "data.vocab_size=280", "data.window=64"],
}


@pytest.mark.parametrize("name", EXACT)
def test_stopping_and_resuming_is_not_stopping(text: Path, name: str) -> None:
    overrides = ["trainer.max_steps=6", "trainer.evaluate_every=3", *EXACT[name]]
    train(configure("run_dir=whole", *overrides))
    train(configure("run_dir=parts", "trainer.stop_at_step=3", *overrides))
    status = json.loads((text / "parts/status.json").read_text())
    assert (status["state"], status["step"]) == ("interrupted", 3)
    torch.manual_seed(12345)  # a new process would not have the old one's generators
    train(configure("resume=parts", *overrides))
    assert_same_end(text / "whole", text / "parts")
    if "epoch" in name:
        assert untimed(text / "whole/metrics.jsonl")[-1]["data/epoch"] >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("mode", "dropout"), [("unfused", 0), ("fused", 0), ("fused", 0.2)])
def test_stopping_and_resuming_on_a_gpu_is_not_stopping(text: Path, mode: str, dropout: float, optimizer: str) -> None:
    """In processes of their own: a recording of the step begins anew, and cuBLAS reads its workspace's setting once."""
    wide = ["model.embedding_dim=64", "model.column_width=32", "model.head_width=32", "model.chunk_size=16"]
    command = [sys.executable, str(ROOT / "scripts/train.py"), *BASE, *QUICK, *wide, "trainer.max_steps=12"]
    command += [f"mode={mode}", f"optimizer={optimizer}", "trainer.device=cuda", "trainer.dtype=bfloat16"]
    command += ["trainer.deterministic=true", "data.window=64", f"model.dropout={dropout}"]
    for ending in (["run_dir=whole"], ["run_dir=parts", "trainer.stop_at_step=6"], ["resume=parts"]):
        done = subprocess.run([*command, *ending], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    assert_same_end(text / "whole", text / "parts")


def test_reading_ahead_changes_nothing(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ["trainer.max_steps=4", "trainer.accumulation=2"]
    train(configure("run_dir=plain", *limits))
    monkeypatch.setattr("neurogen.training.session.read_ahead", Prefetcher)
    train(configure("run_dir=ahead", "trainer.stop_at_step=2", *limits))
    train(configure("resume=ahead", *limits))
    rows = read_metrics(text / "ahead/metrics.jsonl")
    assert all(row["data/stalls"] >= 0 and row["data/wait_seconds"] >= 0 for row in rows)
    assert all(0 <= row["data/wait_share"] < 1 for row in rows)
    assert untimed(text / "ahead/metrics.jsonl") == untimed(text / "plain/metrics.jsonl")
    plain, ahead = load_checkpoint("plain"), load_checkpoint("ahead")
    assert plain.metadata["data_position"] == ahead.metadata["data_position"]
    for key, tensor in plain.model_tensors.load().items():
        assert torch.equal(tensor, ahead.model_tensors[key])


def test_lanes_carry_state_and_random_windows_do_not(text: Path) -> None:
    train(configure("run_dir=lanes", "trainer.max_steps=2"))
    train(configure("run_dir=random", "data.batching=random", "trainer.max_steps=2"))
    lanes, random = load_checkpoint("lanes").state_tensors, load_checkpoint("random").state_tensors
    assert lanes.load()["brain/position"].tolist() == [2 * 16] * 4
    assert not any(name.startswith("brain/") for name in random)


@pytest.mark.parametrize(("limit", "steps"), [("max_tokens=130", 3), ("max_steps=2", 2), ("max_seconds=1e-6", 1)])
def test_each_limit_ends_a_run(text: Path, limit: str, steps: int) -> None:
    train(configure("run_dir=a", "trainer.max_steps=null", f"trainer.{limit}", "trainer.evaluate_every=0"))
    assert json.loads(Path("a/status.json").read_text())["step"] == steps


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_where(
    text: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from neurogen.training.update import Update

    call = Update.__call__

    def signalled(self: Update, *args: Any) -> Any:
        os.kill(os.getpid(), number)
        return call(self, *args)

    monkeypatch.setattr(Update, "__call__", signalled)
    assert train(configure("run_dir=a", "trainer.max_steps=1000")) == code
    err = capsys.readouterr().err
    assert "interrupted at step 1" in err
    assert "saved a/checkpoints/step-00000001" in err
    assert "resume=a" in err
    assert load_checkpoint("a").step == 1


def test_resume_auto_starts_continues_and_notices_the_end(text: Path) -> None:
    command = ("run_dir=a", "resume=auto", "trainer.max_steps=3")
    train(configure(*command, "trainer.stop_at_step=1"))
    assert load_checkpoint("a").step == 1
    train(configure(*command))
    assert load_checkpoint("a").step == 3
    train(configure(*command))
    assert [row["step"] for row in read_metrics("a/metrics.jsonl")] == [1, 2, 3]


def test_what_changed_is_said_and_what_would_corrupt_is_refused(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(configure("run_dir=a", "trainer.stop_at_step=2"))
    before = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file() and path.name != "lock"}
    for override, message in {
        "model.embedding_dim=24": r"model\.embedding_dim=24: the run to resume has model\.embedding_dim=16",
        "data.tokenizer=bpe data.vocab_size=280": r"data\.tokenizer=bpe: the run to resume has",
        "optimizer=muon": r"optimizer\.name=muon: the run to resume has",
        "data.lanes=8": r"data\.lanes=8: the run to resume has data\.lanes=4",
        "data.path=file1.txt": "data: the text is not the one",
        "seed=9": "seed=9: the run to resume has seed=0",
    }.items():
        with pytest.raises(UserError, match=message):
            train(configure("resume=a", *override.split()))
        after = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file() and path.name != "lock"}
        assert after == before, override
    capsys.readouterr()
    train(configure("resume=a", "optimizer.lr=0.5"))
    assert "optimizer.lr: 0.002 -> 0.5" in capsys.readouterr().err
    assert read_metrics("a/metrics.jsonl")[-1]["train/learning_rate"] > 0.01


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode=fused"], r"mode=fused: its kernels take model\.column_width of 16, .*, not 8"),
        (["trainer.device=cuda:77"], r"device=cuda:77: this machine has"),
        (["trainer.device=toaster"], "device=toaster: unknown"),
        (["data.path=missing.txt"], "missing.txt"),
        (["data.lanes=400"], "400 lanes"),
        (["mode=pointer", "model.dropout=0.1"], "model.dropout is 0.1, and mode=pointer trains without"),
    ],
)
def test_a_mistake_leaves_no_run_directory(text: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(configure("run_dir=a", *overrides))
    assert not Path("a").exists()


def test_a_failed_run_says_so(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from neurogen.training.trainer import Trainer

    def broken(self: Trainer) -> dict[str, float]:
        raise RuntimeError("no more\nluck")

    monkeypatch.setattr(Trainer, "validate", broken)
    with pytest.raises(RuntimeError, match="luck"):
        train(configure("run_dir=a"))
    status = json.loads(Path("a/status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "RuntimeError: no more luck")


def test_a_trained_model_loads_and_a_foreign_vocabulary_does_not(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(configure("run_dir=a", "trainer.evaluate_every=0"))
    trained = load_trained("a", mode=ModeConfig(), device="cpu", dtype="auto")
    assert (trained.step, trained.tokenizer.kind, trained.starts_documents) == (8, "bytes", True)
    saved = load_checkpoint("a").model_tensors.load()
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    foreign = BpeTokenizer.train(["the cat sat on the mat"], vocab_size=260)
    monkeypatch.setattr("neurogen.training.trained.load_tokenizer", lambda path: foreign)
    with pytest.raises(UserError, match=r"its tokenizer \(260 ids\) is not the one its weights were trained with"):
        load_trained("a", mode=ModeConfig(), device="cpu", dtype="auto")


@pytest.mark.slow
def test_a_float64_run_and_a_bfloat16_run(text: Path) -> None:
    for dtype in ("float64", "bfloat16"):
        train(configure(f"run_dir={dtype}", f"trainer.dtype={dtype}", "trainer.max_steps=3"))
    for dtype, kept in (("float64", torch.float64), ("bfloat16", torch.float32)):
        assert load_checkpoint(dtype).model_tensors.load()["decoder.weight"].dtype == kept


def test_a_mixture_evaluates_each_source(text: Path) -> None:
    sources = "{a: {path: 'file[0-2].txt', weight: 1}, b: {path: 'file[3-5].txt', weight: 3}}"
    train(
        compose_config(
            ["experiment=test", "data=mixture", f"data.sources={sources}", *QUICK, "run_dir=m", "trainer.max_steps=1"]
        )
    )
    row = read_metrics("m/metrics.jsonl")[-1]
    assert row["val/a/loss"] != row["val/b/loss"]
    assert "val_reset/bpb" in row
    # Both have the same share of evaluate_tokens, so the whole is their mean and not just the first source.
    assert row["val/loss"] == pytest.approx((row["val/a/loss"] + row["val/b/loss"]) / 2, rel=1e-6)
