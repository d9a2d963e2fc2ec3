"""Weights rounded to 8 bits, against a definition one weight at a time."""

import pytest
import torch

from neurogen import BrainConfig, NeuroGen
from neurogen.training.rounding import LARGEST, round_rows, round_weights


def nearest(row: list[float], kind: str) -> list[float]:
    """Each weight's nearest of all that 8 bits can say."""
    if kind == "int8":
        values = torch.arange(-127, 128).double()
    else:
        values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
        values = values[values.isfinite()]
    scale = max(abs(x) for x in row) / LARGEST[kind]
    return [float(values[(values - x / scale).abs().argmin()]) * scale for x in row]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_each_weight_becomes_the_nearest_that_its_row_can_say(kind: str) -> None:
    weight = torch.randn(5, 37, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [0], [1], [7], [50]]
    )
    expected = [nearest(row, kind) if any(row) else row for row in weight.tolist()]
    torch.testing.assert_close(round_rows(weight, kind), torch.tensor(expected))


@pytest.mark.parametrize("tie", [False, True])
def test_matrices_are_rounded_and_nothing_else(tie: bool) -> None:
    torch.manual_seed(0)
    model = NeuroGen(BrainConfig(32, 16, 16, tie_embedding=tie), vocab_size=41)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    count = round_weights(model, "int8")
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")} | {
        "embedding.weight" if tie else "decoder.weight"
    }
    assert count == sum(before[name].numel() for name in changed)
    again = {name: parameter.clone() for name, parameter in model.named_parameters()}
    round_weights(model, "int8")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, again[name])
