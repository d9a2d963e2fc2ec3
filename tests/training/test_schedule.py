"""Schedules against their closed forms."""

import math

import pytest

from neurogen.config.schema import ConstantConfig, CosineConfig, TrainerConfig, WSDConfig
from neurogen.training.schedule import Progress, learning_rate_scale, run_share


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.37, 0.55, 0.999, 1.0])
def test_cosine(share: float) -> None:
    scale = learning_rate_scale(CosineConfig(warmup=0.1, final_scale=0.2), share, step=0)
    # cos^2(pi q / 2) is the half cosine in another form.
    expected = share / 0.1 if share < 0.1 else 0.2 + 0.8 * math.cos(math.pi / 2 * (share - 0.1) / 0.9) ** 2
    assert scale == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 0.0), (0.02, 0.5), (0.04, 1.0), (0.5, 1.0), (0.75, 1.0), (0.875, 0.55), (1.0, 0.1)]
)
def test_wsd(share: float, expected: float) -> None:
    schedule = WSDConfig(warmup=0.04, decay=0.25, final_scale=0.1)
    assert learning_rate_scale(schedule, share, step=0) == pytest.approx(expected, abs=1e-12)


def test_wsd_without_decay_is_constant() -> None:
    for share in (0.3, 1.0):
        assert learning_rate_scale(WSDConfig(warmup=0.1, decay=0.0), share, step=9) == 1.0
        assert learning_rate_scale(ConstantConfig(warmup=0.1), share, step=9) == 1.0


def test_warm_up_lasts_for_the_longer_of_share_and_steps() -> None:
    schedule = ConstantConfig(warmup=0.1, warmup_steps=10)
    assert learning_rate_scale(schedule, 0.5, step=0) == pytest.approx(0.1)
    assert learning_rate_scale(schedule, 0.5, step=9) == 1.0
    assert learning_rate_scale(schedule, 0.05, step=50) == pytest.approx(0.5)


def test_share_follows_the_limit_closest_to_its_end() -> None:
    progress = Progress(step=10, tokens=300, seconds=45.0)
    trainer = TrainerConfig(max_steps=100, max_tokens=1000, max_seconds=60.0)
    assert run_share(progress, trainer, by="steps") == pytest.approx(0.105)
    assert run_share(progress, trainer, by="tokens", step_tokens=20) == pytest.approx(0.31)
    assert run_share(progress, trainer, by="seconds") == pytest.approx(0.75)
    assert run_share(progress, trainer) == pytest.approx(0.75)
    assert run_share(progress, TrainerConfig(max_steps=100)) == pytest.approx(0.105)
    assert run_share(Progress(step=200), TrainerConfig(max_steps=100)) == 1.0


def test_neither_first_nor_last_step_of_a_run_has_rate_zero() -> None:
    trainer, schedule = TrainerConfig(max_steps=50), WSDConfig(warmup=0.1, decay=0.5, final_scale=0.0)
    scales = [learning_rate_scale(schedule, run_share(Progress(step=step), trainer), step=step) for step in range(50)]
    assert min(scales) > 0
    assert max(scales) == 1.0
