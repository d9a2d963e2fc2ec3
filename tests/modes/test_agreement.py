"""Every mode gives what the whole-sequence reference gives: loss, gradients, states, health."""

import copy
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from neurogen import BrainState, NeuroGen

TOKEN_MODES = ("naive", "pointer", "preallocated")


class Case(NamedTuple):
    """A model and a sequence."""

    config: dict[str, Any]
    lanes: int = 2
    num_tokens: int = 6
    resets: bool = True
    carried: bool = True


CASES = {
    "graded-hebbian": Case({}),
    "binary-delta": Case({"spike": "binary", "memory_rule": "delta"}),
    "smooth": Case({"spike": "smooth", "homeostasis": 0.0}),
    "graded-delta-tied": Case({"memory_rule": "delta", "tie_embedding": True}),
    "no-lateral-no-gate": Case({"lateral": False, "go_gate": False}),
    "one-token": Case({"memory_rule": "delta"}, num_tokens=1),
    "one-lane-new-state": Case({}, lanes=1, num_tokens=9, resets=False, carried=False),
    "deep": Case({"wernicke_depth": 2, "hippocampus_depth": 2, "broca_depth": 2}, lanes=3, num_tokens=5),
    "no-broca": Case({"broca_depth": 0, "pfc_depth": 0}, num_tokens=3),
    "one-column-one-head": Case({"embedding_dim": 7, "column_width": 7, "head_width": 7}, lanes=3, num_tokens=4),
    "no-tokens": Case({}, num_tokens=0),
    "token-shift": Case({"token_shift": 4, "memory_rule": "delta"}, num_tokens=9),
    "token-shift-one-token": Case({"token_shift": 3}, num_tokens=1),
    "token-shift-no-tokens": Case({"token_shift": 2}, num_tokens=0),
    "token-shift-no-resets": Case({"token_shift": 2}, resets=False),
}


def sequence(case: Case, model: NeuroGen, seed: int) -> tuple[Tensor, Tensor, Tensor | None, BrainState]:
    """Ids, targets (one ignored), document starts and the state before them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.lanes, case.num_tokens)
    ids = torch.randint(model.vocab_size, shape, generator=generator)
    targets = torch.randint(model.vocab_size, shape, generator=generator)
    if case.num_tokens > 1:
        targets[0, 1] = -100
    starts = torch.rand(shape, generator=generator) < 0.3 if case.resets else None
    state = model.init_state(case.lanes)
    if case.carried:
        past = torch.randint(model.vocab_size, (case.lanes, 5), generator=generator)
        with torch.no_grad():
            state = model(past.to(model.device)).state
    return ids, targets, starts, state


def run(model: NeuroGen, mode: str, case: Case, seed: int = 4, state: BrainState | None = None) -> dict[str, Tensor]:
    """Everything a training step sees: outputs, and gradients of a loss that also weighs the final state. The state
    before is the one given or the sequence's own."""
    ids, targets, starts, own_state = sequence(case, model, seed)
    state = own_state if state is None else state
    device = model.device
    model.set_mode(mode)
    model.zero_grad()
    state = state.map(lambda x: x.detach().clone().requires_grad_() if x.is_floating_point() else x)
    starts = None if starts is None else starts.to(device)
    out = model(ids.to(device), state, document_start=starts, target_ids=targets.to(device))
    generator = torch.Generator().manual_seed(5)
    total = out.loss
    for x in out.state.tensors().values():
        if x.is_floating_point():
            total = total + 0.1 * (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) * x).sum()
    total.backward()
    results = {"loss": out.loss, "num_correct": out.num_correct, "num_targets": out.num_targets}
    results |= {f"state {name}": x for name, x in out.state.tensors().items()}
    results |= {f"health {name}": x for name, x in out.health.items()}
    results |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, x in state.tensors().items():
        if x.grad is not None:
            results[f"gradient of initial {name}"] = x.grad
    return {name: x.detach().double().cpu() for name, x in results.items()}


def assert_equal_results(results: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float) -> None:
    """Norm of the difference over norm of the reference, of each tensor; no gradient is a gradient of zero."""
    for name in results.keys() | reference.keys():
        assert name.startswith("gradient") or (name in results and name in reference), name
        expected = reference[name] if name in reference else torch.zeros_like(results[name])
        allowed = max(tolerance, 1e-6) if name.startswith("health") else tolerance  # health is float32
        error = float((results.get(name, 0.0) - expected).norm() / expected.norm().clamp_min(1e-3))
        assert error <= allowed, f"{name}: {error}"


@pytest.mark.parametrize("name", CASES)
def test_modes_agree_in_float64(name: str, make_model: Callable[..., NeuroGen]) -> None:
    case = CASES[name]
    model = make_model(**case.config)
    reference = run(model, "unfused", case)
    if case.num_tokens:
        assert reference["loss"] > 0.5, "a loss of next to nothing would make the comparison empty"
    for mode in TOKEN_MODES:
        assert_equal_results(run(model, mode, case), reference, 1e-10)


@pytest.mark.parametrize("name", ["graded-hebbian", "graded-delta-tied"])
def test_modes_agree_in_float32(name: str, make_model: Callable[..., NeuroGen]) -> None:
    case = CASES[name]
    model = make_model(dtype=torch.float32, **case.config)
    reference = run(model, "unfused", case)
    for mode in TOKEN_MODES:
        assert_equal_results(run(model, mode, case), reference, 1e-4)


@pytest.mark.parametrize("mode", TOKEN_MODES)
def test_every_parameter_gets_a_gradient(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(memory_rule="delta")
    run(model, mode, CASES["graded-hebbian"])
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("mode", TOKEN_MODES)
def test_logits_and_gates_agree(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    model = make_model()
    ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
        gates = model.mode.sequence(model.brain, model.embedding, ids, model.init_state(2), None).go
        model.set_mode(mode)
        got = model(ids)
        out = model.mode.sequence(model.brain, model.embedding, ids, model.init_state(2), None)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.go, gates, rtol=0, atol=1e-10)


def test_gates_pass_gradients_in_preallocated(make_model: Callable[..., NeuroGen]) -> None:
    """A penalty on the Go rate reaches the weights below the gates as in the reference."""
    model = make_model()
    ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
    gradients = []
    for mode in ("unfused", "preallocated"):
        model.set_mode(mode)
        model.zero_grad()
        out = model.mode.sequence(model.brain, model.embedding, ids, model.init_state(2), None)
        out.go.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("mode", TOKEN_MODES)
def test_training_follows_the_same_path(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    ids = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(1))
    histories = []
    for each in ("unfused", mode):
        model = make_model(mode=each)
        histories.append([model.train_step(ids[:, :-1], ids[:, 1:]) for _ in range(3)])
    for expected, got in zip(*histories):
        assert got == pytest.approx(expected, abs=1e-9)
    assert histories[0][2][0] < histories[0][0][0]


def test_a_weight_changed_before_the_reverse_pass_is_noticed(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(mode="preallocated")
    ids = torch.zeros(1, 3, dtype=torch.int64)
    loss = model(ids, target_ids=ids).loss
    with torch.no_grad():
        model.brain.wernicke[0].out_proj.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_preallocated_goes_back_twice_alike(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(mode="preallocated", memory_rule="delta")
    ids = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(1))
    loss = model(ids, target_ids=ids).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name], msg=name)


def test_only_some_weights_train(make_model: Callable[..., NeuroGen]) -> None:
    """Frozen weights get no gradient and take none from the others."""
    gradients = []
    for mode in ("unfused", "preallocated"):
        model = make_model(mode=mode)
        model.requires_grad_(False)
        model.brain.wernicke[0].in_proj.weight.requires_grad_(True)
        ids = torch.randint(11, (1, 4), generator=torch.Generator().manual_seed(2))
        model(ids, target_ids=ids).loss.backward()
        trained = [name for name, p in model.named_parameters() if p.grad is not None]
        assert trained == ["brain.wernicke.0.in_proj.weight"]
        gradients.append(model.brain.wernicke[0].in_proj.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


def errors(results: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """As `assert_equal_results` measures them, of what both have."""
    common = results.keys() & reference.keys()
    return {
        name: float((results[name] - reference[name]).norm() / reference[name].norm().clamp_min(1e-3))
        for name in common
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["graded-hebbian", "graded-delta-tied", "one-token"])
def test_modes_agree_on_gpu(name: str, make_model: Callable[..., NeuroGen]) -> None:
    case = CASES[name]
    model = make_model(dtype=torch.float32, **case.config).to("cuda")
    reference = run(model, "unfused", case)
    for mode in TOKEN_MODES:
        assert_equal_results(run(model, mode, case), reference, 1e-4)


FUSED_SIZES = {"embedding_dim": 64, "column_width": 32, "head_width": 32}
FUSED_CASES = {
    "fused-hebbian": Case(FUSED_SIZES),
    "fused-delta-tied": Case({**FUSED_SIZES, "memory_rule": "delta", "tie_embedding": True}, lanes=3, num_tokens=70),
    "fused-one-lane": Case(FUSED_SIZES, lanes=1, num_tokens=9, resets=False, carried=False),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["graded-hebbian", "graded-delta-tied", "one-token", *FUSED_CASES])
def test_modes_agree_in_bfloat16_on_gpu(name: str, make_model: Callable[..., NeuroGen]) -> None:
    """Rounding moves neurons over the kinks of their derivative, in every mode others; so each mode is held to float64,
    and may be half as far again from it as the definition is in bfloat16. One sequence's error is a matter of which
    few neurons were moved, so errors are medians over sequences."""
    case, num_sequences = {**CASES, **FUSED_CASES}[name], 15
    modes = ("unfused", *TOKEN_MODES, "fused") if name in FUSED_CASES else ("unfused", *TOKEN_MODES)
    model = make_model(dtype=torch.float32, **case.config).to("cuda")
    double = copy.deepcopy(model).double()
    measured: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in range(num_sequences):
        *_, state = sequence(case, double, seed)
        exact = run(double, "unfused", case, seed, state)
        state = state.map(lambda x: x.float() if x.is_floating_point() else x)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            for mode in modes:
                for quantity, error in errors(run(model, mode, case, seed, state), exact).items():
                    measured[mode, quantity].append(error)
    for (mode, quantity), each in measured.items():
        assert median(each) <= max(3e-2, 1.5 * median(measured["unfused", quantity])), (mode, quantity)
