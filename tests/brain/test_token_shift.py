"""Token shift against a sum by hand, its state, and what must refuse or accept it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neurogen import BrainConfig, BrainState, NeuroGen, UserError
from neurogen.brain.regions import MemoryLayer
from neurogen.brain.state import ShiftedMemoryState
from neurogen.brain.token_shift import TokenShift, token_shift
from neurogen.generation.launch import fits_launch
from neurogen.training.optimizer import OTHER, parameter_role


def by_hand(h: Tensor, taps: Tensor, recent: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token, with a list of rows that a start empties."""
    out, carried = torch.zeros_like(h), torch.zeros_like(recent)
    for lane in range(h.shape[0]):
        rows = list(recent[lane])
        for t in range(h.shape[1]):
            if starts[lane, t]:
                rows = [torch.zeros_like(row) for row in rows]
            rows.append(h[lane, t])
            out[lane, t] = sum(taps[j] * rows[-1 - j] for j in range(len(taps)))
            rows.pop(0)
        carried[lane] = torch.stack(rows)
    return out, carried


@pytest.mark.parametrize("num_taps", [2, 3, 4])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 11])
def test_it_is_the_sum_by_hand(num_taps: int, num_tokens: int) -> None:
    draw = torch.Generator().manual_seed(num_tokens)
    h = torch.randn(3, num_tokens, 5, dtype=torch.float64, generator=draw)
    taps = torch.randn(num_taps, 5, dtype=torch.float64, generator=draw)
    recent = torch.randn(3, num_taps - 1, 5, dtype=torch.float64, generator=draw)
    starts = torch.rand(3, num_tokens, generator=draw) < 0.3
    for now in (starts, torch.zeros_like(starts), torch.ones_like(starts)):
        expected = by_hand(h, taps, recent, now)
        for got, wanted in zip(token_shift(h, taps, recent, now), expected):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(token_shift(h, taps, recent, None), by_hand(h, taps, recent, torch.zeros_like(starts))):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_differences() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, generator=draw).requires_grad_()
        for shape in ((2, 4, 3), (3, 3), (2, 2, 3))
    ]
    starts = torch.tensor([[False, False, True, False], [False] * 4])
    assert torch.autograd.gradcheck(lambda h, taps, recent: token_shift(h, taps, recent, starts), inputs)


def test_it_starts_as_the_identity_and_keeps_the_type() -> None:
    shift = TokenShift(5, 3)
    h = torch.randn(2, 4, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, recent = shift(h, shift.init_recent(2), None)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, h)
    assert recent.dtype == torch.float32
    assert torch.equal(recent, h[:, -2:].float())


def test_a_brain_with_taps_at_the_identity_is_one_without(make_model: Callable[..., NeuroGen]) -> None:
    plain, shifted = make_model(), make_model(token_shift=4)
    weights = plain.state_dict()
    with torch.no_grad():
        for name, parameter in shifted.named_parameters():
            if name.endswith("shift.taps"):
                parameter.zero_()
                parameter[0] = 1.0
            else:
                parameter.copy_(weights[name])
    ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shifted(ids).logits, plain(ids).logits, rtol=1e-12, atol=1e-12)


def test_its_rows_are_state(make_model: Callable[..., NeuroGen], tmp_path: Path) -> None:
    """Saved, loaded, reset by lane and selected with the rest; another brain's state does not fit."""
    model = make_model(token_shift=3)
    ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = model(ids[:, :5]).state
        state.save(tmp_path / "state")
        loaded = BrainState.load(tmp_path / "state")
        assert torch.equal(model(ids[:, 5:], loaded).logits, model(ids[:, 5:], state).logits)
        again = model(ids[:, 5:], state.reset([1]))
        assert torch.equal(again.logits[:1], model(ids[:1, 5:], state.select([0])).logits)
        assert torch.equal(again.logits[1:], model(ids[1:, 5:]).logits)
    layer = state.layers["pfc.0"]
    assert isinstance(layer, ShiftedMemoryState)
    assert layer.recent.shape == (2, 2, 24)
    assert layer.recent.abs().sum() > 0
    with pytest.raises(UserError, match="other layers"):
        state.check_fits(make_model().init_state(2))


def test_who_takes_it(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(token_shift=2)
    assert isinstance(model.brain.pfc[0], MemoryLayer)
    assert parameter_role("brain.pfc.0.shift.taps", model.brain.pfc[0].shift.taps) == OTHER  # type: ignore[union-attr]
    assert "model.token_shift" in str(fits_launch(model))
    assert model.flops_per_token() == make_model().flops_per_token()
    with pytest.raises(UserError, match=r"model\.token_shift is 5"):
        BrainConfig(token_shift=5)
