"""How far back: against counts by hand and closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from neurogen import NeuroGen
from neurogen.baselines import GPT, GPTConfig
from neurogen.data import Batch
from neurogen.diagnosis import horizon
from neurogen.diagnosis.horizon import (
    AgeBin,
    context_lengths,
    gradient_by_lag,
    loss_by_context,
    memory_horizon,
    octaves,
    token_losses,
    workspace_gradient_by_lag,
)


def make_batch(lanes: int, num_tokens: int, vocab_size: int, *starts: tuple[int, int]) -> Batch:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (lanes, num_tokens + 1), generator=draw)
    document_start = torch.zeros(lanes, num_tokens, dtype=torch.bool)
    for lane, t in starts:
        document_start[lane, t] = True
    return Batch(ids[:, :-1], ids[:, 1:], document_start)


def test_context_lengths_count_from_the_last_start() -> None:
    starts = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [0, 1, 1, 0, 0]]).bool()
    assert context_lengths(starts).tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 1, 2], [1, 1, 1, 2, 3]]


def test_octaves_cover_every_length_once() -> None:
    assert octaves(0) == []
    assert octaves(1) == [(1, 1)]
    assert octaves(2) == [(1, 1), (2, 2)]
    assert octaves(9) == [(1, 1), (2, 3), (4, 9)]
    assert octaves(11) == [(1, 1), (2, 3), (4, 7), (8, 11)]


def test_loss_by_context_is_the_count_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    losses = torch.rand(3, 11, generator=draw, dtype=torch.float64)
    counted = torch.rand(3, 11, generator=draw) > 0.2
    starts = torch.rand(3, 11, generator=draw) > 0.8
    lengths = context_lengths(starts)
    for each in loss_by_context(losses, lengths, counted):
        picked = [
            [float(losses[b, t]) for t in range(11) if counted[b, t] and each.first <= lengths[b, t] <= each.last]
            for b in range(3)
        ]
        together = [value for lane in picked for value in lane]
        means = torch.tensor([sum(lane) / len(lane) for lane in picked if lane], dtype=torch.float64)
        assert each.count == len(together)
        assert each.loss == pytest.approx(sum(together) / len(together))
        assert (
            math.isnan(each.error)
            if len(means) == 1
            else each.error == pytest.approx(float(means.std()) / math.sqrt(len(means)))
        )
    assert sum(each.count for each in loss_by_context(losses, lengths, counted)) == int(counted.sum())


def test_the_horizon_is_where_most_of_the_fall_is_behind() -> None:
    def bins(*losses: float) -> list[AgeBin]:
        return [AgeBin(first, last, loss, 0.0, 1) for (first, last), loss in zip(octaves(2 ** len(losses) - 1), losses)]

    assert memory_horizon(bins(4.0, 3.0, 2.2, 2.04, 2.0)) == 8
    assert memory_horizon(bins(4.0, 2.0, 2.0)) == 2
    assert memory_horizon(bins(1.0, 1.0, 2.0)) is None
    assert memory_horizon([]) is None


@pytest.mark.parametrize("most", [1 << 25, 2 * 11 * 3])
def test_token_losses_are_those_of_the_model(
    make_model: Callable[..., NeuroGen], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """The mean over the window is the model's loss, in one piece or in pieces of three tokens."""
    monkeypatch.setattr(horizon, "MAX_LOGITS", most)
    model = make_model()
    batch = make_batch(2, 8, 11, (0, 5))
    batch.target_ids[1, 2] = -100
    losses = token_losses(model, batch)
    assert losses.shape == (2, 8)
    assert losses[1, 2] == 0
    whole = model(batch.input_ids, document_start=batch.document_start, target_ids=batch.target_ids)
    assert float(losses.sum() / 15) == pytest.approx(float(whole.loss.detach()), rel=1e-5)
    state, step = model.init_state(2), 0
    for step in range(8):
        if step == 5:
            state = state.reset([0])
        logits, state = model.step(batch.input_ids[:, step], state)
        if step == 6:
            expected = -torch.log_softmax(logits, -1)[torch.arange(2), batch.target_ids[:, 6]]
            torch.testing.assert_close(losses[:, 6].double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_gpt_reads_the_window_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horizon, "MAX_LOGITS", 4)
    torch.manual_seed(0)
    model = GPT(GPTConfig(embedding_dim=16, num_layers=1, head_width=8), vocab_size=11)
    torch.nn.init.normal_(model.decoder.weight)
    batch = make_batch(2, 8, 11)
    whole = model(batch.input_ids, document_start=batch.document_start, target_ids=batch.target_ids)
    assert float(token_losses(model, batch).mean()) == pytest.approx(float(whole.loss.detach()), rel=1e-5)


@pytest.mark.parametrize("positions", [[9], [4, 7, 9]])
def test_gradient_of_a_linear_leak_is_a_power(positions: list[int]) -> None:
    """y_t = sum_l a^l w . x_{t-l} has d y_t / d x_{t-l} = a^l w, so G_l = a^l |w|."""
    decay = 0.7
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64)

    def losses_of(x: Tensor) -> Tensor:
        y, rows = torch.zeros(x.shape[0], dtype=x.dtype), []
        for t in range(x.shape[1]):
            y = decay * y + x[:, t] @ weight
            rows.append(y)
        return torch.stack(rows, dim=1)

    x = torch.randn(3, 10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    never = torch.zeros(3, 10, dtype=torch.bool)
    found = gradient_by_lag(losses_of, x, positions, context_lengths(never))
    expected = 5.0 * decay ** torch.arange(positions[-1] + 1, dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_lags_beyond_a_reset_are_left_out() -> None:
    """One lane's document starts at token 6: its loss at token 7 has lags 0 and 1 alone; the other lane has all."""
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def losses_of(x: Tensor) -> Tensor:
        return (x.sum(-1) * scale[:, None]).cumsum(1)

    starts = torch.zeros(2, 8, dtype=torch.bool)
    starts[1, 6] = True
    found = gradient_by_lag(losses_of, torch.zeros(2, 8, 1, dtype=torch.float64), [7], context_lengths(starts))
    assert found.tolist() == [2.0, 2.0, *[1.0] * 6]
    starts[0, 6] = True
    found = gradient_by_lag(losses_of, torch.zeros(2, 8, 1, dtype=torch.float64), [7], context_lengths(starts))
    assert found[:2].tolist() == [2.0, 2.0]
    assert found[2:].isnan().all()


def test_gradient_of_a_brain_is_that_of_differences(make_model: Callable[..., NeuroGen]) -> None:
    """The norm at one lag against central differences along every channel, on a smooth stretch: graded spikes have a
    surrogate derivative only outside (0, 4), so a brain without cortex is compared."""
    model = make_model(wernicke_depth=0, broca_depth=0)
    batch = make_batch(1, 6, 11)
    found = workspace_gradient_by_lag(model, batch, [5])
    assert found.shape == (6,)
    state = model.init_state(1)
    with torch.no_grad():
        x, recent = model.brain.thalamus(batch.input_ids, model.embedding.weight, state.recent_ids, None, "reference")

        def loss(moved: Tensor) -> Tensor:
            logits = model.decoder(model.brain.think(moved, recent, state).broca_output)
            return torch.nn.functional.cross_entropy(logits[:, 5], batch.target_ids[:, 5])

        slopes = []
        for channel in range(24):
            step = torch.zeros_like(x)
            step[0, 3, channel] = 1e-5
            slopes.append(float(loss(x + step) - loss(x - step)) / 2e-5)
    assert float(found[2]) == pytest.approx(math.hypot(*slopes), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
