"""Optimisers against their formulas in float64, and their state as tensors."""

import math

import pytest
import torch
from torch import Tensor, nn

from neurogen import BrainConfig, NeuroGen
from neurogen.config.schema import AdamWConfig, MuonConfig
from neurogen.errors import UserError
from neurogen.training.muon import Muon, orthogonalize
from neurogen.training.optimizer import DECODER, GATE, HIDDEN, OTHER, ModelOptimizer, build_optimizer, parameter_role

NO_SKIP, SKIP = torch.zeros(()), torch.ones(())


def tiny(*, rule: str = "delta", tie: bool = False) -> NeuroGen:
    torch.manual_seed(0)
    config = BrainConfig(embedding_dim=16, column_width=8, head_width=8, memory_rule=rule, tie_embedding=tie)
    return NeuroGen(config, vocab_size=11).double()


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def test_roles() -> None:
    roles: dict[str, set[str]] = {HIDDEN: set(), GATE: set(), DECODER: set(), OTHER: set()}
    for name, param in tiny().named_parameters():
        roles[parameter_role(name, param)].add(name.replace(".0.", "."))
    mlp = {"mlp.in_proj.weight", "mlp.out_proj.weight"}
    both = {"in_proj.weight", "out_proj.weight", *mlp}
    cortex = {f"brain.{region}.{name}" for region in ("wernicke", "broca") for name in {*both, "lateral_weight"}}
    memory = {f"brain.{region}.{name}" for region in ("hippocampus", "pfc") for name in both}
    assert roles[HIDDEN] == cortex | memory
    assert roles[DECODER] == {"decoder.weight"}
    gates = {f"brain.{region}.{name}.weight" for region in ("hippocampus", "pfc") for name in ("forget", "write")}
    assert roles[GATE] == gates | {"brain.basal_ganglia.go.weight"}
    others = {"embedding.weight", "brain.thalamus.taps", "brain.basal_ganglia.go.bias"}
    others |= {f"brain.{region}.{name}" for region in ("wernicke", "broca") for name in ("drive_bias", "decay_logit")}
    others |= {f"brain.{region}.{name}.bias" for region in ("hippocampus", "pfc") for name in ("forget", "write")}
    assert roles[OTHER] == others


def test_a_tied_embedding_is_no_decoder() -> None:
    model = tiny(tie=True)
    roles = {name: parameter_role(name, param) for name, param in model.named_parameters()}
    assert roles["embedding.weight"] == OTHER
    assert DECODER not in roles.values()
    build_optimizer(model, MuonConfig())


def test_adamw_follows_its_formula() -> None:
    model = tiny()
    config = AdamWConfig(lr=0.01, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = build_optimizer(model, config)
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    first = {name: torch.zeros_like(param) for name, param in expected.items()}
    second = {name: torch.zeros_like(param) for name, param in expected.items()}
    scales = [1.0, 0.5, 0.25]
    for step, scale in enumerate(scales, start=1):
        set_gradients(model, step)
        optimizer.set_rate_scale(scale)
        optimizer.step(skip=NO_SKIP)
        rate = config.lr * scale
        for name, param in model.named_parameters():
            grad = param.grad
            assert grad is not None
            decays = parameter_role(name, param) != OTHER
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            corrected = (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-6)
            expected[name] = expected[name] * (1 - rate * 0.2 * decays) - rate * corrected
            torch.testing.assert_close(param.detach(), expected[name], rtol=1e-12, atol=1e-14)
    assert optimizer.learning_rate == pytest.approx(0.0025)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (3, 8, 8), (1, 5)])
def test_orthogonalize_keeps_directions_and_levels_singular_values(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix)
    # In the matrix's own singular basis the result is diagonal ...
    diagonal = left.mT @ result @ right.mT
    leveled = diagonal.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, torch.diag_embed(leveled), atol=1e-9, rtol=0)
    # ... and each value is the quintic applied five times to the normalised one.
    x = values / values.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(leveled, x, atol=1e-9, rtol=0)
    assert leveled[values / values.amax(-1, keepdim=True) > 0.05].min() > 0.6
    assert leveled.max() < 1.25


def test_orthogonalize_a_zero_matrix_and_a_batch_as_its_parts() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))
    batch = torch.randn(5, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(batch), torch.stack([orthogonalize(each) for each in batch]))


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_follows_its_formula(nesterov: bool) -> None:
    torch.manual_seed(2)
    param = nn.Parameter(torch.randn(6, 10, dtype=torch.float64))
    muon = Muon([param], 0.1, weight_decay=0.3, momentum=0.9, nesterov=nesterov)
    expected, momentum = param.detach().clone(), torch.zeros(6, 10, dtype=torch.float64)
    for _ in range(3):
        param.grad = torch.randn(6, 10, dtype=torch.float64)
        muon.step()
        momentum = 0.9 * momentum + 0.1 * param.grad
        direction = 0.1 * param.grad + 0.9 * momentum if nesterov else momentum
        expected = expected - 0.1 * 0.3 * expected - 0.1 * 0.2 * math.sqrt(10) * orthogonalize(direction)
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-14)


def test_muon_takes_stacked_projections_one_matrix_at_a_time() -> None:
    torch.manual_seed(3)
    stacked = nn.Parameter(torch.zeros(16, 8, dtype=torch.float64))
    grad = torch.randn(16, 8, dtype=torch.float64)
    muon = Muon([{"params": [stacked], "num_stacked": 2}], 1.0, nesterov=False)
    stacked.grad = grad
    muon.step()
    parts = [-0.2 * math.sqrt(8) * orthogonalize(part) for part in grad.chunk(2)]
    torch.testing.assert_close(stacked.detach(), torch.cat(parts))


@pytest.mark.parametrize("config", [AdamWConfig(), MuonConfig()])
def test_a_skipped_step_leaves_everything(config: AdamWConfig | MuonConfig) -> None:
    model = tiny()
    optimizer = build_optimizer(model, config)
    set_gradients(model, 1)
    optimizer.step(skip=NO_SKIP)

    def everything() -> dict[str, Tensor]:
        named = (*model.named_parameters(), *optimizer.state_tensors().items())
        return {name: value.detach().clone() for name, value in named}

    before = everything()
    for param in model.parameters():
        param.grad = torch.full_like(param, math.nan)
    optimizer.step(skip=SKIP)
    after = everything()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("config", [AdamWConfig(), MuonConfig(lr_rest=1e-3)])
def test_state_tensors_continue_exactly(config: AdamWConfig | MuonConfig) -> None:
    one, other = tiny(), tiny()
    optimizer = build_optimizer(one, config)
    for seed in (1, 2):
        set_gradients(one, seed)
        optimizer.step(skip=NO_SKIP)
    other.load_state_dict(one.state_dict())
    restored = build_optimizer(other, config)
    restored.load_state_tensors({name: tensor.clone() for name, tensor in optimizer.state_tensors().items()})
    for model, each in ((one, optimizer), (other, restored)):
        set_gradients(model, 3)
        each.step(skip=NO_SKIP)
    for mine, theirs in zip(one.parameters(), other.parameters()):
        assert torch.equal(mine, theirs)


def test_state_of_another_optimizer_or_model_is_refused() -> None:
    model = tiny()
    adamw, muon = build_optimizer(model, AdamWConfig()), build_optimizer(model, MuonConfig())
    set_gradients(model, 1)
    muon.step(skip=NO_SKIP)
    with pytest.raises(UserError, match=r"momentum_buffer, which is another optimiser's"):
        adamw.load_state_tensors(muon.state_tensors())
    with pytest.raises(UserError, match=r"gone\.weight/exp_avg"):
        adamw.load_state_tensors({"gone.weight/exp_avg": torch.zeros(1)})
    with pytest.raises(UserError, match=r"has shape \(3,\)"):
        adamw.load_state_tensors({"decoder.weight/exp_avg": torch.zeros(3)})


def test_half_precision_moments_are_refused_where_nothing_keeps_them() -> None:
    with pytest.raises(UserError, match=r"optimizer\.moments=bfloat16: needs whole float32 parameters on a CUDA GPU"):
        build_optimizer(tiny(), AdamWConfig(moments="bfloat16"))


def test_every_parameter_needs_one_place() -> None:
    model = tiny()
    half = list(model.parameters())[::2]
    with pytest.raises(AssertionError, match="one group"):
        ModelOptimizer(model, [torch.optim.AdamW(half)])
