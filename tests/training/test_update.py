"""One step: accumulation, clipping, weighting, skipping."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from neurogen import BrainConfig, NeuroGen
from neurogen.brain import BrainState
from neurogen.config.schema import AdamWConfig
from neurogen.data import Batch
from neurogen.training.meter import Meter
from neurogen.training.optimizer import build_optimizer
from neurogen.training.precision import Precision
from neurogen.training.update import StepResult, Update, split_batch

CPU64 = Precision(torch.device("cpu"), "float64")
BRAIN = BrainConfig(embedding_dim=16, column_width=8, head_width=8, chunk_size=4)


def make_update(model: NeuroGen, *, clip_norm: float = 1e9, lr: float = 1e-3) -> Update:
    return Update(model, build_optimizer(model, AdamWConfig(lr=lr)), clip_norm=clip_norm, precision=CPU64)


def make_model(**settings: float) -> NeuroGen:
    torch.manual_seed(0)
    model = NeuroGen(dataclasses.replace(BRAIN, **settings), vocab_size=7).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for param in model.parameters():  # zero projections would hide what the state carries
            param.add_(0.1 * torch.randn_like(param))
    return model


def make_batch(lanes: int, window: int, *, seed: int = 0, ignored: float = 0.3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, (lanes, window + 1), generator=generator)
    targets = ids[:, 1:].masked_fill(torch.rand(lanes, window, generator=generator) < ignored, -100)
    starts = torch.rand(lanes, window, generator=generator) < 0.1
    return Batch(ids[:, :-1], targets, starts)


def gradients(model: NeuroGen) -> dict[str, Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("num_parts", [2, 3, 6])
def test_accumulation_is_one_big_batch(num_parts: int) -> None:
    # Nothing is learnt from a part without targets, so how its neurons fired does not count either.
    model = make_model() if num_parts == 2 else make_model(homeostasis=0.0)
    update = make_update(model)
    first, second = make_batch(6, 5, seed=1), make_batch(6, 5, seed=2)
    second.target_ids[:2] = -100  # a whole part without targets, for three and for six parts

    whole_state = update.backward([first], [None]).states[0]
    update.optimizer.zero_grad()
    whole = update.backward([second], [whole_state])
    expected = gradients(model)

    update.optimizer.zero_grad()
    states = update.backward(split_batch(first, num_parts), [None] * num_parts).states
    update.optimizer.zero_grad()
    parts = update.backward(split_batch(second, num_parts), states)

    assert parts.num_targets == whole.num_targets == int((second.target_ids != -100).sum())
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.grad_norm, whole.grad_norm, rtol=1e-10, atol=1e-12)
    assert int(parts.num_correct) == int(whole.num_correct)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    for name, tensor in BrainState.cat(parts.states).tensors().items():
        torch.testing.assert_close(tensor, whole.states[0].tensors()[name], rtol=1e-10, atol=1e-12, msg=name)


def test_the_loss_is_the_mean_over_targets_and_its_history_ends_with_the_step() -> None:
    model = make_model()
    batch = make_batch(3, 5)
    result = make_update(model).backward([batch], [None])
    logits = model(batch.input_ids, document_start=batch.document_start).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.target_ids.flatten())
    torch.testing.assert_close(result.loss, expected.detach())
    assert not any(tensor.requires_grad for tensor in result.states[0].tensors().values())
    assert not result.loss.requires_grad


@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e9])
def test_clipping_scales_the_global_norm(clip_norm: float) -> None:
    model = make_model()
    batch = make_batch(3, 5)
    make_update(model).backward([batch], [None])
    raw = gradients(model)
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in raw.values()))
    clipped = make_model()
    result = make_update(clipped, clip_norm=clip_norm)([batch], [None])
    assert float(result.grad_norm) == pytest.approx(norm, rel=1e-12)  # reported before clipping
    factor = min(1.0, clip_norm / (norm + 1e-6))
    for name, grad in gradients(clipped).items():
        torch.testing.assert_close(grad, raw[name] * factor, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_step_is_skipped_and_the_next_one_works(poison: float) -> None:
    model = make_model()
    update = make_update(model)
    update([make_batch(2, 4)], [None])
    before = copy.deepcopy(dict(model.state_dict()))
    moments = {name: tensor.clone() for name, tensor in update.optimizer.state_tensors().items()}
    handle = model.decoder.weight.register_hook(lambda grad: grad * poison)
    result = update([make_batch(2, 4, seed=1)], [None])
    handle.remove()
    assert float(result.skipped) == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in update.optimizer.state_tensors().items():
        assert torch.equal(tensor, moments[name]), name
    assert float(update([make_batch(2, 4, seed=2)], list(result.states)).skipped) == 0
    assert not torch.equal(model.decoder.weight, before["decoder.weight"])


def test_a_state_that_overflowed_starts_again_from_zero() -> None:
    model = make_model()
    state = model.init_state(2)
    state.layers["pfc.0"].fast_weight[0] = math.inf
    result = make_update(model)([make_batch(2, 4, ignored=0.0)], [state])
    assert float(result.skipped) == 1
    for name, tensor in result.states[0].tensors().items():
        assert bool(torch.isfinite(tensor.double()).all()), name


def test_a_batch_without_targets_updates_nothing_but_moves_the_state() -> None:
    model = make_model()
    batch = make_batch(2, 4, ignored=2.0)
    result = make_update(model).backward([batch], [None])
    assert (result.num_targets, float(result.loss), float(result.grad_norm)) == (0, 0.0, 0.0)
    assert result.states[0].position.tolist() == [4, 4]


def step_result(loss: float, targets: int, *, skipped: bool = False, rate: float = 0.5) -> StepResult:
    number = torch.tensor
    health = {"rate": number(rate)}
    return StepResult(
        number(loss), number(targets // 2), targets, number(2.0 * loss), number(float(skipped)), health, []
    )


def test_the_meter_averages_by_target_and_leaves_skipped_steps_out() -> None:
    meter = Meter(torch.device("cpu"))
    assert meter.read() == {}
    meter.add(step_result(1.0, 10, rate=0.2))
    meter.add(step_result(math.nan, 10, skipped=True, rate=math.nan))
    meter.add(step_result(4.0, 30, rate=0.4))
    read = meter.read()
    assert read["train/loss"] == pytest.approx((1.0 * 10 + 4.0 * 30) / 40)
    assert read["train/accuracy"] == pytest.approx(20 / 40)
    assert read["train/grad_norm"] == pytest.approx((2.0 + 8.0) / 2)
    assert read["health/rate"] == pytest.approx(0.3)
    assert read["train/skipped_steps"] == 1
    meter.add(step_result(math.inf, 10, skipped=True))
    later = meter.read()
    assert math.isnan(later["train/loss"])
    assert later["train/skipped_steps"] == 2


def test_a_meter_continues_from_its_state() -> None:
    one, other = Meter(torch.device("cpu")), Meter(torch.device("cpu"))
    one.add(step_result(1.0, 10))
    other.load_state(*one.state())
    for meter in (one, other):
        meter.add(step_result(3.0, 20))
    assert one.read() == other.read()
