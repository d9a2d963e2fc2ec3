"""Every mode gives what the whole-sequence reference gives: loss, gradients, states, health."""

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from math import inf, isfinite, log, sqrt
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


FALSE_ALARMS = 1e-2  # a case
FLOOR, FACTOR = 3e-2, 1.5


@cache
def rank_sums(num_ranks: int) -> list[int]:
    """In how many ways some of the ranks 1 to num_ranks add up to each sum."""
    ways = [1]
    for rank in range(1, num_ranks + 1):
        ways = [a + b for a, b in zip([*ways, *[0] * rank], [*[0] * rank, *ways], strict=True)]
    return ways


def signed_rank_p_value(differences: list[float]) -> float:
    """Wilcoxon's: how likely a sum of positive ranks as large as this is, if each difference is as likely to be its
    negative. Exact; among equals a difference that is not positive ranks higher, which makes it larger."""
    ordered = sorted(differences, key=lambda d: (abs(d), d <= 0))
    observed = sum(rank for rank, d in enumerate(ordered, 1) if d > 0)
    return sum(rank_sums(len(ordered))[observed:]) / 2 ** len(ordered)


def excesses(measured: dict[tuple[str, str], list[float]]) -> list[str]:
    """What is further from float64 than max(FLOOR, FACTOR times the definition's error), worst first.

    Arguments:
        measured: errors by mode and quantity, one a sequence, in the same order for all; those of `unfused` are the
            definition's.

    A mode that scatters as the definition does, and is just FACTOR times as far off, gives a logarithm of the quotient
    that is symmetric about the allowed one; one that is better gives lower ranks. So the chance that any of a case's
    comparisons is listed here without reason is at most FALSE_ALARMS (Bonferroni).
    """
    found = []
    compared = [(mode, quantity) for mode, quantity in measured if mode != "unfused"]
    for mode, quantity in compared:
        each, own = measured[mode, quantity], measured["unfused", quantity]
        allowed = [max(FLOOR, FACTOR * y) for y in own]
        p_value = signed_rank_p_value(
            [log(max(x, 1e-12) / y) if isfinite(x) else inf for x, y in zip(each, allowed, strict=True)]
        )
        if p_value <= FALSE_ALARMS / len(compared):
            figures = f"{median(each):.4f}, unfused {median(own):.4f}, p {p_value:.1e}"
            found.append((p_value, f"{mode}, {quantity}: {figures}"))
    return [line for _, line in sorted(found)]


def bfloat16_errors(
    model: NeuroGen, case: Case, modes: tuple[str, ...], num_sequences: int
) -> dict[tuple[str, str], list[float]]:
    """Errors against float64 by mode and quantity, one a sequence, of a float32 model under autocast; `all gradients`
    is their root mean square, which scatters less than each."""
    double = copy.deepcopy(model).double()
    measured: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in range(num_sequences):
        *_, state = sequence(case, double, seed)
        exact = run(double, "unfused", case, seed, state)
        state = state.map(lambda x: x.float() if x.is_floating_point() else x)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            for mode in modes:
                found = errors(run(model, mode, case, seed, state), exact)
                squares = [error**2 for quantity, error in found.items() if quantity.startswith("gradient")]
                found["all gradients"] = sqrt(sum(squares) / len(squares))
                for quantity, error in found.items():
                    measured[mode, quantity].append(error)
    return measured


def test_excesses_are_told_from_scatter() -> None:
    """Errors that scatter over a factor of ten, in each mode by itself: as they are found, and a part made worse."""
    generator = torch.Generator().manual_seed(0)
    quantities = [f"quantity {i}" for i in range(50)]
    for num_sequences, worse in ((48, 4.0), (24, 8.0)):
        for _ in range(20):
            measured = {
                (mode, quantity): (0.05 * torch.randn(num_sequences, generator=generator).mul(0.6).exp()).tolist()
                for mode in ("unfused", *TOKEN_MODES)
                for quantity in quantities
            }
            assert excesses(measured) == []
            measured["naive", "quantity 3"] = [worse * x for x in measured["naive", "quantity 3"]]
            measured["pointer", "quantity 5"] = [worse * x for x in measured["pointer", "quantity 5"]]
            measured["pointer", "quantity 7"][:] = [float("nan")] * num_sequences
            assert {line.split(":")[0] for line in excesses(measured)} == {
                "naive, quantity 3",
                "pointer, quantity 5",
                "pointer, quantity 7",
            }


def test_modes_agree_in_bfloat16(make_model: Callable[..., NeuroGen]) -> None:
    """As on a GPU below; what is compared there is first tried here, on one case."""
    case = CASES["graded-hebbian"]
    model = make_model(dtype=torch.float32, **case.config)
    assert excesses(bfloat16_errors(model, case, ("unfused", *TOKEN_MODES), 20)) == []


@pytest.mark.parametrize("mode", ["naive", "pointer"])
def test_weights_are_not_rounded_in_sums_over_tokens(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    """Autocast's cache would sum a weight's gradient over tokens in bfloat16; without the cache there is nothing to sum
    in. The forward pass is the same in both, and so no neuron crosses a kink."""
    case = Case(FUSED_SIZES, lanes=1, num_tokens=50, resets=False, carried=False)
    model = make_model(dtype=torch.float32, **case.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached = run(model, mode, case)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        assert_equal_results(cached, run(model, mode, case), 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["graded-hebbian", "graded-delta-tied", "one-token", *FUSED_CASES])
def test_modes_agree_in_bfloat16_on_gpu(name: str, make_model: Callable[..., NeuroGen]) -> None:
    """Rounding moves neurons over the kinks of their derivative, in every mode others; so each mode is held to float64,
    and may be half as far again from it as the definition is in bfloat16. One sequence's error is a matter of which
    few neurons were moved, and scatters over a factor of ten; so many are compared, pair by pair."""
    case = {**CASES, **FUSED_CASES}[name]
    modes = ("unfused", *TOKEN_MODES, "fused") if name in FUSED_CASES else ("unfused", *TOKEN_MODES)
    model = make_model(dtype=torch.float32, **case.config).to("cuda")
    found = excesses(bfloat16_errors(model, case, modes, 48 if case.num_tokens < 20 else 24))
    assert not found, "\n" + "\n".join(found)
