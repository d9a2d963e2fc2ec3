"""Neural health: its parts against closed forms, and the pictures a run leaves."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from neurogen import NeuroGen
from neurogen.baselines import GPT, LSTM, GPTConfig, LSTMConfig
from neurogen.brain.regions import CortexLayer, MemoryLayer
from neurogen.data import TokenStream
from neurogen.diagnosis.health import half_lives, last_positions, measure_health, spread_lanes, time_constants
from neurogen.diagnosis.health_plots import draw_health
from neurogen.diagnosis.trajectory import principal_trajectory


def make_stream(num_tokens: int, *, start_id: int | None = None, vocab_size: int = 11) -> TokenStream:
    ids = np.random.default_rng(0).integers(1, vocab_size, num_tokens).astype(np.uint8)
    if start_id is not None:
        ids[::37] = start_id
    return TokenStream(ids, np.zeros(1, np.int64), start_id, "x")


def test_a_path_in_a_plane_comes_out_whole() -> None:
    """An ellipse in a random plane: its axes are the components, all variance is explained, up to a sign."""
    angle = torch.linspace(0, 2 * math.pi, 41, dtype=torch.float64)[:-1]
    ellipse = torch.stack([3.0 * angle.cos(), 1.5 * angle.sin()], dim=1)
    basis, _ = torch.linalg.qr(torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    found = principal_trajectory(ellipse @ basis.T + 5.0)
    assert found.explained == pytest.approx(1.0)
    torch.testing.assert_close(found.path.abs(), ellipse.abs())
    assert (found.path.gather(0, found.path.abs().argmax(0, keepdim=True)) > 0).all()


def test_explained_variance_and_paths_without_a_plane() -> None:
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    x = torch.cat([x, -x])
    assert principal_trajectory(x).explained == pytest.approx(13 / 14)
    still = principal_trajectory(torch.ones(4, 3))
    assert still.explained == 1.0
    assert still.path.tolist() == [[0.0, 0.0]] * 4
    line = principal_trajectory(torch.tensor([[1.0], [1.5], [6.5]])).path
    torch.testing.assert_close(line, torch.tensor([[-2.0, 0.0], [-1.5, 0.0], [3.5, 0.0]], dtype=torch.float64))
    assert principal_trajectory(torch.ones(1, 3)).path.shape == (1, 2)


def test_time_constants_and_half_lives_are_those_of_the_weights(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(dtype=torch.float64)
    cortex, memory = model.brain.broca[0], model.brain.pfc[0]
    assert isinstance(cortex, CortexLayer)
    assert isinstance(memory, MemoryLayer)
    with torch.no_grad():
        cortex.decay_logit.copy_(torch.logit(torch.exp(-1.0 / torch.full((24,), 50.0, dtype=torch.float64))))
        memory.forget.bias.copy_(torch.logit(torch.full((4,), 0.5 ** (1 / 9000), dtype=torch.float64)))
    assert set(time_constants(model)) == {"wernicke.0", "broca.0"}
    torch.testing.assert_close(time_constants(model)["broca.0"], torch.full((24,), 50.0, dtype=torch.float64))
    assert set(half_lives(model)) == {"hippocampus.0", "pfc.0"}
    torch.testing.assert_close(half_lives(model)["pfc.0"], torch.full((4,), 9000.0, dtype=torch.float64))


def test_lanes_are_spread_over_the_text() -> None:
    stream = make_stream(101, start_id=0)
    batch = spread_lanes(stream, lanes=3, window=10)
    for lane, start in enumerate((0, 45, 90)):
        assert batch.input_ids[lane].tolist() == stream.tokens[start : start + 10].tolist()
        assert batch.target_ids[lane].tolist() == stream.tokens[start + 1 : start + 11].tolist()
    assert (batch.document_start == (batch.input_ids == 0)).all()
    assert spread_lanes(stream, lanes=64, window=40).input_ids.shape == (2, 40)
    assert spread_lanes(make_stream(5), lanes=64, window=40).input_ids.shape == (1, 4)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 512])
def test_positions_are_tokens_of_the_last_quarter(num_tokens: int) -> None:
    positions = last_positions(num_tokens)
    assert positions[-1] == num_tokens - 1
    assert positions == sorted(set(positions))
    assert all(0 <= t < num_tokens for t in positions)
    assert num_tokens < 16 or (len(positions) == 4 and positions[0] >= 3 * num_tokens // 4)


@pytest.mark.parametrize("mode", ["unfused", "naive"])
def test_a_brain_is_measured_and_drawn(make_model: Callable[..., NeuroGen], tmp_path: Path, mode: str) -> None:
    """Drawn once: to draw takes longer, and does not see the mode."""
    model = make_model(dtype=torch.float32, mode=mode)
    before = torch.get_rng_state()
    health = measure_health(model, make_stream(400, start_id=0), lanes=2, window=8)
    assert model.mode.name == mode
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(each.count for each in health.context_loss) == 2 * 8 * 16
    assert health.gradient is not None
    assert health.gradient.shape == (8,)
    assert health.activity is not None
    assert health.activity.workspace["broca.0"].shape == (128, 24)
    if mode != "unfused":
        return
    paths = draw_health(health, tmp_path)
    assert {path.stem for path in paths} == {"memory_horizon", "time_constants", "gradient_lag", "spikes", "workspace"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    numbers = json.loads((tmp_path / "health.json").read_text())
    assert numbers["context_loss"][0]["loss"] == pytest.approx(health.context_loss[0].loss)
    assert len(numbers["gradient_by_lag"]) == 8
    assert numbers["time_constants"]["wernicke.0"][1] > 0


def test_what_only_a_brain_has_is_left_out(tmp_path: Path) -> None:
    stream = make_stream(400)
    gpt = GPT(GPTConfig(embedding_dim=16, num_layers=1, head_width=8), vocab_size=11)
    lstm = LSTM(LSTMConfig(embedding_dim=8, hidden_dim=8, num_layers=1), vocab_size=11)
    for model, longest in ((gpt, 8), (lstm, 128)):
        health = measure_health(model, stream, lanes=2, window=8)
        assert health.context_loss[-1].last == longest  # a GPT carries nothing past its window
        assert [path.stem for path in draw_health(health, tmp_path)] == ["memory_horizon"]


def test_a_brain_of_memory_alone(make_model: Callable[..., NeuroGen], tmp_path: Path) -> None:
    model = make_model(dtype=torch.float32, wernicke_depth=0, broca_depth=0)
    health = measure_health(model, make_stream(60), lanes=2, window=8)
    assert "spikes" not in {path.stem for path in draw_health(health, tmp_path)}
