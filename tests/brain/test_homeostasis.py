"""Homeostasis: its gradient in every mode, and where it drives firing rates."""

from collections.abc import Callable

import pytest
import torch

from kernels.activity import activity_shares_reference, homeostatic_pull
from kernels.activity.fused import activity_shares_fused
from kernels.launch import INTERPRETED
from neurogen import BrainConfig, NeuroGen, UserError
from neurogen.brain.homeostasis import add_homeostasis

MODES = ("unfused", "naive", "pointer", "preallocated")


def gradients(model: NeuroGen, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(ids[:, :-1], target_ids=ids[:, 1:])
    assert out.loss is not None
    out.loss.backward()
    return float(out.loss.detach()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_the_pull_is_by_how_much_a_neuron_misses_the_target(backend: str) -> None:
    device = "cpu" if INTERPRETED else "cuda"
    fired = torch.tensor([[0, 2, 10], [2, 0, 0]], dtype=torch.int32, device=device)
    every, half = torch.tensor(10, device=device), torch.tensor(5, device=device)
    expected = torch.tensor([[-0.6, 0.0, 2.4], [0.0, -0.6, -0.6]], device=device)
    pull = homeostatic_pull(fired, 10, every, strength=3.0, target=0.2)
    torch.testing.assert_close(pull, expected.double())
    torch.testing.assert_close(homeostatic_pull(fired, 10, half, strength=3.0, target=0.2), 2 * pull)
    for num_targets, factor in ((every, 1.0), (half, 2.0), (0 * half, 10.0)):
        biases = [torch.randn(3, device=device, requires_grad=True) for _ in fired]
        own = torch.tensor(1.25, device=device, requires_grad=True)
        loss = add_homeostasis(own, biases, fired, 10, num_targets, strength=3.0, target=0.2, backend=backend)
        assert float(loss.detach()) == 1.25
        loss.backward(torch.tensor(0.5, device=device))
        assert float(own.grad) == 0.5  # type: ignore[arg-type]
        for bias, row in zip(biases, expected):
            assert bias.grad is not None
            torch.testing.assert_close(bias.grad, 0.5 * factor * row)


def test_shares_of_many_neurons_agree() -> None:
    device = "cpu" if INTERPRETED else "cuda"
    fired, saturated = torch.randint(0, 9, (2, 3, 70), dtype=torch.int32, device=device)
    expected = activity_shares_reference(fired, saturated, 8)
    torch.testing.assert_close(activity_shares_fused(fired, saturated, 8), expected)
    assert (expected > 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_only_the_biases_gradients_change_and_by_the_pull(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    ids = torch.randint(11, (2, 10), generator=torch.Generator().manual_seed(0))
    loss, plain = gradients(make_model(mode=mode, homeostasis=0.0), ids)
    model = make_model(mode=mode, homeostasis=0.5, firing_rate=0.3)
    same_loss, pulled = gradients(model, ids)
    assert same_loss == loss
    with torch.no_grad():
        activity = model.mode.sequence(model.brain, model.embedding, ids[:, :-1], model.init_state(2), None).activity
    for name, gradient in pulled.items():
        expected = plain[name]
        if name.endswith("drive_bias"):
            layer = name.removeprefix("brain.").removesuffix(".drive_bias")
            rate = activity[layer].num_fired.double() / 18
            expected = expected + 0.5 * (rate - 0.3)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():  # evaluation has nothing to do with it
        assert float(model(ids[:, :-1], target_ids=ids[:, 1:]).loss) == pytest.approx(loss, rel=1e-12)


def test_rates_go_where_they_should() -> None:
    """With nothing to learn from, silent and busy neurons end near the target."""
    torch.manual_seed(0)
    config = BrainConfig(embedding_dim=32, column_width=16, head_width=16, homeostasis=1.0, firing_rate=0.2)
    model = NeuroGen(config, vocab_size=11)
    layer = model.brain.cortex_layers()["wernicke.0"]
    with torch.no_grad():
        layer.drive_bias.copy_(torch.linspace(-1.0, 1.0, 32))
    optimizer = torch.optim.SGD([layer.drive_bias], lr=0.2)
    ids = torch.randint(11, (16, 33), generator=torch.Generator().manual_seed(1))
    rates = []
    for _ in range(120):
        optimizer.zero_grad()
        out = model(ids[:, :-1], target_ids=ids[:, 1:])
        assert out.loss is not None
        out.loss.backward()
        optimizer.step()
        rates.append((float(out.health["wernicke/firing_rate"]), float(out.health["wernicke/silent"])))
    assert rates[0][1] > 0.3
    assert rates[-1][0] == pytest.approx(0.2, abs=0.03)
    assert rates[-1][1] == 0.0


def test_a_new_brain_fires_less_than_a_quarter_of_its_neurons() -> None:
    """On text of unequal letters, and whatever the time constant: no neuron is on at every token by its bias alone."""
    torch.manual_seed(0)
    model = NeuroGen(BrainConfig(), vocab_size=257)
    draw = torch.Generator().manual_seed(1)
    ids = torch.multinomial(1.0 / torch.arange(1, 258), 16 * 256, replacement=True, generator=draw).view(16, 256)
    with torch.no_grad():
        out = model(ids)
    for region in ("wernicke", "broca"):
        assert float(out.health[f"{region}/firing_rate"]) < 0.25
        assert float(out.health[f"{region}/silent"]) < 0.2


@pytest.mark.parametrize(
    ("settings", "message"), [({"homeostasis": -1.0}, "homeostasis"), ({"firing_rate": 1.0}, "firing_rate")]
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BrainConfig(**settings)  # type: ignore[arg-type]
