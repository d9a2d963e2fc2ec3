import json
import random

import numpy as np
import pytest
import torch

from neurogen.errors import UserError
from neurogen.training.rng import capture_rng, restore_rng


def draw() -> list:
    # An odd number of normal draws leaves a spare value cached in Python's and numpy's generators.
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        float(np.random.normal()),
        torch.rand(5).tolist(),
        torch.randn(3).tolist(),
    ]


def test_restored_generators_draw_the_same() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()
    states = json.loads(json.dumps(capture_rng(), allow_nan=False))
    expected = draw()
    assert draw() != expected
    restore_rng(states)
    assert draw() == expected


def test_capturing_draws_nothing() -> None:
    states = capture_rng()
    assert capture_rng() == states


def test_a_generator_without_a_device_is_named() -> None:
    states = capture_rng()
    other = None if torch.cuda.is_available() else states["torch"]
    assert restore_rng({**states, "cuda": other}) == ["cuda"]
    assert restore_rng(states) == []


@pytest.mark.parametrize(
    "damage",
    [
        {"torch": "AAAA"},
        {"torch": "%"},
        {"torch": None},
        {"python": [3, [1], None]},
        {"numpy": ["MT19937", "", 0, 0, 0.0]},
    ],
)
def test_malformed_states_are_one_line(damage: dict) -> None:
    with pytest.raises(UserError, match="cannot be restored"):
        restore_rng({**capture_rng(), **damage})
    with pytest.raises(UserError, match="cannot be restored"):
        restore_rng({})
