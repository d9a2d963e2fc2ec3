"""The local rule against back-propagation through time, where they must agree and where they cannot."""

from contextlib import nullcontext

import pytest
import torch

from neurogen import BrainConfig, NeuroGen
from neurogen.brain import BrainState
from neurogen.data import Batch
from neurogen.errors import UserError
from neurogen.learning import LocalLearningConfig, make_learning_rule
from neurogen.learning.agreement import by_group, cosines, window_gradients
from neurogen.learning.local import LocalLearning
from neurogen.learning.rule import BPTT

SIZES = {"embedding_dim": 12, "column_width": 4, "head_width": 4, "chunk_size": 4}
CORTEX_ALONE = {"wernicke_depth": 1, "hippocampus_depth": 0, "pfc_depth": 0, "broca_depth": 0}
FEEDBACKS = ["symmetric", "random", "spatial"]


def make_model(*, diagonal: bool = False, **settings: object) -> NeuroGen:
    torch.manual_seed(0)
    model = NeuroGen(BrainConfig(**(SIZES | settings)), vocab_size=7).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.add_(0.3 * torch.randn_like(param))
            if diagonal and name.endswith("lateral_weight"):
                param.mul_(torch.eye(4, dtype=torch.float64))
    return model


def make_batch(lanes: int = 3, window: int = 9, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, (lanes, window + 1), generator=generator)
    targets = ids[:, 1:].masked_fill(torch.rand(lanes, window, generator=generator) < 0.2, -100)
    return Batch(ids[:, :-1], targets, torch.rand(lanes, window, generator=generator) < 0.15)


def local(model: NeuroGen, **settings: object) -> LocalLearning:
    rule = make_learning_rule(LocalLearningConfig(**settings), model, seed=0)  # type: ignore[arg-type]
    assert isinstance(rule, LocalLearning)
    return rule


def worn_state(model: NeuroGen, lanes: int = 3) -> BrainState:
    with torch.no_grad():
        return model(make_batch(lanes, seed=5).input_ids).state


@pytest.mark.parametrize("feedback", ["symmetric", "spatial"])
@pytest.mark.parametrize(
    "settings",
    [
        {"spike": "graded", "lateral": False},
        {"spike": "binary", "lateral": False},
        {"spike": "smooth", "lateral": False, "homeostasis": 0.0},
        {"spike": "graded", "diagonal": True},  # a neuron's synapse on itself is the eligibility's own
        {"spike": "binary", "diagonal": True, "adaptation_decay": 0.6, "threshold": 0.2},
    ],
)
def test_one_cortex_without_lateral_recurrence_learns_exactly_as_bptt(settings: dict, feedback: str) -> None:
    model = make_model(**CORTEX_ALONE, **settings)
    batch, state = make_batch(), worn_state(model)
    ours = window_gradients(local(model, feedback=feedback), model, batch, state)
    exact = window_gradients(BPTT(), model, batch, state)
    checked = [name for name in exact if name.startswith(("brain.wernicke", "decoder"))]
    assert len(checked) >= 7
    for name in checked:
        assert exact[name].abs().max() > 1e-6, name
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-10, atol=1e-12, msg=name)


def test_what_time_adds_is_not_small() -> None:
    """The test above would mean little if a rule without traces passed it."""
    model, batch = make_model(**CORTEX_ALONE, lateral=False), make_batch()
    one_token = torch.zeros_like(model.brain.wernicke[0].drive_bias)  # type: ignore[arg-type]
    state = model.init_state(3)
    for t in range(9):
        now = slice(t, t + 1)
        part = Batch(batch.input_ids[:, now], batch.target_ids[:, now], batch.document_start[:, now])
        count = (part.target_ids != -100).sum() / (batch.target_ids != -100).sum()
        gradients = window_gradients(BPTT(), model, part, state)
        one_token += count * gradients["brain.wernicke.0.drive_bias"]
        state = model(part.input_ids, state, document_start=part.document_start).state.detach()
    exact = window_gradients(BPTT(), model, batch)["brain.wernicke.0.drive_bias"]
    assert (one_token - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("rule", ["hebbian", "delta"])
def test_spatial_feedback_at_one_token_is_bptt_for_the_whole_brain(rule: str) -> None:
    model = make_model(memory_rule=rule, wernicke_depth=2)
    batch, state = make_batch(window=1), worn_state(model)
    ours = window_gradients(local(model, feedback="spatial"), model, batch, state)
    exact = window_gradients(BPTT(), model, batch, state)
    for name, gradient in exact.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("token_shift", [0, 3])
def test_the_pass_is_the_models(feedback: str, token_shift: int) -> None:
    model, batch = make_model(token_shift=token_shift), make_batch()
    state = worn_state(model)
    result = local(model, feedback=feedback).learn(model, batch, state, share=1.0, autocast=nullcontext)
    expected = BPTT().learn(model, batch, state, share=0.0, autocast=nullcontext)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-10, atol=0)
    assert int(result.num_correct) == int(expected.num_correct)
    assert result.health.keys() == expected.health.keys()
    for name, value in expected.health.items():
        torch.testing.assert_close(result.health[name], value, msg=name)
    for name, tensor in expected.state.tensors().items():
        torch.testing.assert_close(result.state.tensors()[name], tensor, rtol=1e-9, atol=1e-11, msg=name)
        assert not result.state.tensors()[name].requires_grad


def test_a_full_brain_agrees_in_direction() -> None:
    model, batch = make_model(), make_batch(4, 12)
    found = {feedback: cosines(local(model, feedback=feedback), model, batch) for feedback in FEEDBACKS}
    assert found["symmetric"]["decoder"] == pytest.approx(1, abs=1e-9)
    assert found["random"]["decoder"] == pytest.approx(1, abs=1e-9)  # its own error, whatever goes further back
    assert found["spatial"]["all"] > 0.5
    assert 0 < found["spatial"]["drive"] < 1 - 1e-6  # lateral recurrence and memory are cut
    # On weights that nothing has trained, how the broadcast signals point is chance; the exact one is closest.
    assert max(found["symmetric"]["drive"], abs(found["random"]["drive"])) < found["spatial"]["drive"]


def test_every_parameter_learns_and_time_constants_can_be_left_alone() -> None:
    model, batch = make_model(memory_rule="delta", token_shift=2), make_batch()
    for name, gradient in window_gradients(local(model), model, batch).items():
        assert gradient.abs().max() > 0, name
    local(model, time_constants=False).learn(model, batch, None, share=1.0, autocast=nullcontext)
    assert {name for name, param in model.named_parameters() if param.grad is None} == {
        f"brain.{layer}.0.decay_logit" for layer in ("wernicke", "broca")
    }


def test_the_share_scales_and_gradients_accumulate() -> None:
    model, batch = make_model(), make_batch()
    whole = window_gradients(local(model), model, batch)
    for share in (0.25, 0.75):
        local(model).learn(model, batch, None, share=share, autocast=nullcontext)
    for name, param in model.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(param.grad, whole[name], rtol=1e-10, atol=1e-13)
    model.zero_grad(set_to_none=True)
    local(model).learn(model, batch, None, share=0.0, autocast=nullcontext)
    assert all(param.grad is None for param in model.parameters())


def test_dopamine_weights_tokens_by_surprise_and_is_remembered() -> None:
    model = make_model()
    rule = local(model, dopamine=0.5, prediction_decay=0.9)
    losses = torch.tensor([2.0, 4.0], dtype=torch.float64)
    both = torch.tensor([True, True])
    torch.testing.assert_close(rule._dopamine(losses, both), 1 + 0.5 * (losses - 3) / 3)  # predicted: their own mean
    torch.testing.assert_close(rule._dopamine(torch.full_like(losses, 6.0), both), torch.full_like(losses, 1.5))
    other = local(model, dopamine=0.5, prediction_decay=0.9)
    other.load_state_tensors({name: tensor.clone() for name, tensor in rule.state_tensors().items()})
    predicted = (0.1 * 0.9 * 3 + 0.1 * 6) / (1 - 0.9**2)
    torch.testing.assert_close(other._dopamine(losses, both), 1 + 0.5 * (losses - predicted) / predicted)
    assert float(rule._dopamine(torch.tensor([1e9, 0.0], dtype=torch.float64), both)[0]) == 3.0


def test_the_window_is_not_kept() -> None:
    """What autograd holds between tokens does not grow: the tensors saved at any one time, counted."""
    model = make_model()

    def most_saved(window: int) -> int:
        saved, most = 0, 0

        class Held:
            def __init__(self, tensor: torch.Tensor) -> None:
                nonlocal saved, most
                self.tensor, self.size = tensor.detach(), tensor.numel()  # the tensor itself may make a cycle
                saved += self.size
                most = max(most, saved)

            def __del__(self) -> None:
                nonlocal saved
                saved -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            local(model).learn(model, make_batch(window=window), None, share=1.0, autocast=nullcontext)
        return most

    assert most_saved(16) == most_saved(4) > 0


def test_groups_hold_every_parameter() -> None:
    model = make_model()
    grouped = by_group(dict(model.named_parameters()))  # type: ignore[arg-type]
    assert sum(len(vector) for vector in grouped.values()) == model.num_parameters()


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"feedback": "warp"}, "feedback"), ({"dopamine": -1.0}, "dopamine"), ({"prediction_decay": 1.0}, "decay")],
)
def test_settings_out_of_range(settings: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        LocalLearningConfig(**settings)
