import json
import math

import pytest
import torch

from neurogen.errors import UserError
from neurogen.training.tree import flatten_tree, unflatten_tree


def round_trip(tree):
    tensors, structure = flatten_tree(tree)
    return unflatten_tree(tensors, json.loads(json.dumps(structure, allow_nan=False)))


@pytest.mark.parametrize(
    "tree",
    [
        None,
        {},
        [],
        (),
        {"a": (1, 2.5, [True, None, "x"]), 3: {"b": ()}, "3": 0, -1: []},
        {"tensor": {"dict": [{"list": 1}]}, "float": "nan"},
        {"lr": 1e-3, "huge": 10**30, "inf": math.inf, "third": 1 / 3, "minus": -math.inf, "false": False},
    ],
)
def test_containers_and_numbers_come_back_as_they_were(tree) -> None:
    back = round_trip(tree)
    assert back == tree
    assert repr(back) == repr(tree)


def test_nan_and_tensors_come_back() -> None:
    tree = {1: torch.tensor(3.0), "1": torch.arange(3), "a.b": [torch.zeros(0)], "a": {"b": [torch.ones(1)]}}
    back = round_trip({"x": math.nan, "tree": tree})
    assert math.isnan(back["x"])
    assert back["tree"][1].shape == ()
    assert torch.equal(back["tree"]["1"], torch.arange(3))
    assert back["tree"]["a.b"][0].numel() == 0
    assert torch.equal(back["tree"]["a"]["b"][0], torch.ones(1))


@pytest.mark.parametrize("tree", [{"a": object()}, {1.5: 0}, {True: 0}, {None: 0}, {"a": {1, 2}}, 1j])
def test_what_json_cannot_hold_is_refused(tree) -> None:
    with pytest.raises(TypeError, match="cannot store"):
        flatten_tree(tree)


@pytest.mark.parametrize(
    "structure",
    [{"tensor": "gone"}, {"code": "x"}, {}, {"dict": [[1]]}, {"dict": 3}, {"float": "1+"}, [1], {"dict": [[[], 1]]}],
)
def test_a_foreign_structure_is_one_line(structure) -> None:
    with pytest.raises(UserError, match="use another checkpoint"):
        unflatten_tree({}, structure)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], amsgrad=True, foreach=False),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, centered=True),
    ],
)
def test_an_optimizer_goes_on_bit_for_bit(make) -> None:
    def build():
        torch.manual_seed(1)
        parameters = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(3))]
        return parameters, make(parameters)

    def train(parameters, optimizer, steps) -> None:
        for step in steps:
            loss = sum((p * (step + 1) - 1).pow(2).sum() for p in parameters)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    whole, optimizer = build()
    train(whole, optimizer, range(8))

    parameters, optimizer = build()
    train(parameters, optimizer, range(4))
    saved = round_trip(optimizer.state_dict())
    resumed, optimizer = build()
    with torch.no_grad():
        for ours, theirs in zip(resumed, parameters, strict=True):
            ours.copy_(theirs)
    optimizer.load_state_dict(saved)
    train(resumed, optimizer, range(4, 8))
    for ours, theirs in zip(resumed, whole, strict=True):
        assert torch.equal(ours, theirs)
