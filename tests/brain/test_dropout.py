"""Dropout: its expectation and gradient, where it acts and where it must not, and that 0 changes nothing."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kernels.launch import INTERPRETED
from neurogen import BrainConfig, NeuroGen, UserError
from neurogen.baselines import GPT, GPTConfig
from neurogen.brain.dropout import Dropout, evaluating
from neurogen.diagnosis.step_memory import fused_step_memory
from neurogen.learning import make_learning_rule
from neurogen.learning.config import LocalLearningConfig
from neurogen.modes import TOKEN_BY_TOKEN

MASKS = ("token", "sequence")
FUSED = {"embedding_dim": 16, "column_width": 16, "head_width": 16, "chunk_size": 16}


def ids(lanes: int = 2, num_tokens: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(11, (lanes, num_tokens), generator=torch.Generator().manual_seed(seed))


def gradients(model: NeuroGen) -> dict[str, Tensor]:
    """The loss and its gradients of one sequence, whose draws begin at a seed."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(ids(), target_ids=ids(seed=1)).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": loss.detach()}


@pytest.mark.parametrize("p", [1.0, -0.1, float("nan")])
@pytest.mark.parametrize("config", [BrainConfig, GPTConfig])
def test_what_is_no_probability_below_one_is_refused(p: float, config: type) -> None:
    with pytest.raises(UserError, match=rf"^model.dropout is {p}; it must be in \[0, 1\), 0 for none$"):
        config(dropout=p)


def test_an_unknown_mask_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model.dropout_mask is 'lane'; choose one of token, sequence"):
        BrainConfig(dropout_mask="lane")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_expectation_is_kept_and_so_is_the_share(p: float, mask: str) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 3, 50, dtype=torch.float64)
    y = Dropout(p, mask)(x)
    assert set(y.unique().tolist()) == {0.0, 1 / (1 - p)}
    draws = y[:, 0] if mask == "sequence" else y
    spread = (p / (1 - p) / draws.numel()) ** 0.5  # of the mean
    assert abs(float(y.mean()) - 1.0) < 4 * spread
    same = bool((y == y[:, :1]).all())
    assert same is (mask == "sequence")
    assert len({tuple(row) for row in y[:, 0].tolist()}) > 350  # each lane has its own


@pytest.mark.parametrize("mask", MASKS)
def test_the_gradient_goes_through_the_same_mask(mask: str) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.manual_seed(1)
    kept = Dropout(0.4, mask)(torch.ones_like(x).detach())
    torch.manual_seed(1)
    y = Dropout(0.4, mask)(x)
    torch.testing.assert_close(y, x * kept, rtol=0, atol=0)
    (got,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(got, upstream * kept, rtol=0, atol=0)


def test_without_it_nothing_is_drawn_and_nothing_copied() -> None:
    x, before = torch.randn(2, 3, 4), torch.get_rng_state()
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), before)


def test_a_brain_without_it_is_the_brain_bit_for_bit(make_model: Callable[..., NeuroGen]) -> None:
    plain = make_model(memory_rule="delta")
    expected = gradients(plain)
    dropping = make_model(memory_rule="delta", dropout=0.4)
    assert not torch.equal(gradients(dropping)["loss"], expected["loss"])
    for off in (make_model(memory_rule="delta", dropout=0.0), dropping.eval()):
        for name, value in gradients(off).items():
            assert torch.equal(value, expected[name]), name
    assert dropping.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("mask", MASKS)
def test_every_addition_to_the_workspace_is_masked_and_no_state_is(
    mask: str, make_model: Callable[..., NeuroGen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks put in by hand give the same loss and gradients as those drawn."""
    model = make_model(dropout=0.3, dropout_mask=mask)
    expected = gradients(model)
    drawn: list[Tensor] = []
    torch.manual_seed(5)
    for _ in range(1 + 2 * len(model.brain.layers())):
        drawn.append(Dropout(0.3, mask)(torch.ones(2, 7, 24, dtype=torch.float64)))
    masks = iter(drawn)
    monkeypatch.setattr(Dropout, "forward", lambda self, x: x * next(masks))
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14, msg=name)
    assert next(masks, None) is None


@pytest.mark.skipif(not INTERPRETED, reason="recorded steps with dropout are tested on a GPU")
@pytest.mark.parametrize("mask", MASKS)
def test_fused_agrees_with_unfused_under_the_same_masks(mask: str, make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(dtype=torch.float32, dropout=0.25, dropout_mask=mask, **FUSED)
    expected = gradients(model)
    model.set_mode("fused")
    for name, got in gradients(model).items():
        error = float((got - expected[name]).norm() / expected[name].norm().clamp_min(1e-2))  # some are sums near zero
        assert error <= 1e-4, f"{name}: {error}"


def test_evaluating_ends_where_it_began() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Dropout(0.5), Dropout(0.5)))
    model[1][1].eval()
    with contextlib.suppress(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, True, True, False]


@pytest.mark.parametrize("mode", ["unfused", "naive", "preallocated"])
def test_replies_are_those_of_the_whole_brain(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    expected = make_model().generate(ids(), max_new_tokens=4, seed=3)
    model = make_model(mode=mode, dropout=0.5)
    before = torch.get_rng_state()
    for prompt in (ids(), list(ids())):
        assert torch.equal(model.generate(prompt, max_new_tokens=4, seed=3).tokens, expected.tokens)
    streamed = model.generate_stream(ids(), max_new_tokens=4, chunk_tokens=2, seed=3)
    assert torch.equal(torch.cat([piece.tokens for piece in streamed], 1), expected.tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("mode", TOKEN_BY_TOKEN)
def test_modes_that_go_token_by_token_refuse_to_train_with_it(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(mode=mode, dropout=0.2)
    wanted = f"^model.dropout is 0.2, and mode={mode} trains without; use mode=fused or mode=unfused, or set it to 0$"
    with pytest.raises(UserError, match=wanted):
        model(ids())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids()).logits, make_model()(ids()).logits, rtol=0, atol=1e-10)


def test_local_learning_refuses_it(make_model: Callable[..., NeuroGen]) -> None:
    with pytest.raises(UserError, match=r"^learning=local: trains without model.dropout, which is 0.2; set it to 0"):
        make_learning_rule(LocalLearningConfig(), make_model(dropout=0.2), seed=0)


def test_its_masks_are_counted(make_model: Callable[..., NeuroGen]) -> None:
    def count(**settings: object) -> int:
        return fused_step_memory(make_model(**settings), lanes=2, num_tokens=16, dtype=torch.bfloat16).activations

    assert count(dropout=0.1) - count() == 2 * 16 * 24 * 9  # the relay, and two in each of four layers
    assert count(dropout=0.1, dropout_mask="sequence") == count()


def test_a_gpt_has_it_in_training_alone() -> None:
    config = GPTConfig(32, 2, 16)
    models = []
    for dropout in (0.0, 0.3):
        torch.manual_seed(0)
        models.append(GPT(replace(config, dropout=dropout), vocab_size=11).double())
        for parameter in models[-1].parameters():
            nn.init.normal_(parameter, std=0.2)
    plain, dropping = models
    expected = plain(ids(), target_ids=ids(seed=1)).loss
    losses = []
    for seed in range(200):
        torch.manual_seed(seed)
        losses.append(dropping(ids(), target_ids=ids(seed=1)).loss.detach())
    assert len(set(map(float, losses))) == 200
    assert torch.equal(
        dropping.generate(ids(), max_new_tokens=3).tokens, plain.generate(ids(), max_new_tokens=3).tokens
    )
    assert dropping.training
    assert torch.equal(dropping.eval()(ids(), target_ids=ids(seed=1)).loss, expected)
