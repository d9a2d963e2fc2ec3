"""Draws and thresholds inside a kernel against their definitions in torch."""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import pytest
import torch
import triton
import triton.language as tl

from kernels.launch import INTERPRETED
from kernels.sample import Sampling, processed_logits
from kernels.sample.device import exponential_draw, filter_threshold, from_order_key, order_key, philox_word
from kernels.sample.philox import exponential, philox

DEVICE = "cpu" if INTERPRETED else "cuda"


@triton.jit
def draw_kernel(p_words, p_draws, seed_low, seed_high, position, lane, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.int32)
    word = philox_word(seed_low, seed_high, o * 7919, zero + position, zero + lane)
    tl.store(p_words + o, word.to(tl.int64))
    tl.store(p_draws + o, exponential_draw(word))


@triton.jit
def key_kernel(p_x, p_key, p_back, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    key = order_key(tl.load(p_x + o))
    tl.store(p_key + o, key)
    tl.store(p_back + o, from_order_key(key))


@triton.jit
def threshold_kernel(
    p_logits, p_out, num_ids, top_k, top_p, log_min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tl.store(p_out, filter_threshold(p_logits, num_ids, top_k, top_p, log_min_p, TOP_K, TOP_P, MIN_P, BLOCK))


@pytest.mark.parametrize("seed", [5, 2**63 + 2**31 + 12345])
def test_draws_are_the_definitions(seed: int) -> None:
    words = torch.full((64,), -1, dtype=torch.int64, device=DEVICE)
    draws = torch.full((64,), float("nan"), device=DEVICE)
    low, high = (half - 2**32 if half >= 2**31 else half for half in (seed & 0xFFFFFFFF, seed >> 32))
    draw_kernel[(1,)](words, draws, low, high, 900, 3, BLOCK=64)
    expected = philox(seed, torch.arange(64) * 7919, torch.tensor(900), torch.tensor(3))
    assert torch.equal(words.cpu(), expected)
    torch.testing.assert_close(draws.cpu(), exponential(expected), rtol=1e-6, atol=0)


def test_keys_keep_the_order_of_floats() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 1e-38, -1e-38, 3.4e38, -3.4e38, 2.5], device=DEVICE)
    key, back = torch.empty_like(x, dtype=torch.int32), torch.empty_like(x)
    key_kernel[(1,)](x, key, back, BLOCK=8)
    assert torch.equal(key.argsort(), x.argsort())
    assert torch.equal(back, x)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"min_p": 0.2},
        {"top_k": 12, "top_p": 0.7, "min_p": 0.05},
    ],
)
def test_thresholds_keep_what_the_definition_keeps(settings: dict[str, float]) -> None:
    # Rounded, so that several tokens tie at the threshold.
    logits = (torch.randn(37, generator=torch.Generator().manual_seed(2)) * 6).round() / 2
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    out = torch.full((1,), float("nan"), device=DEVICE)
    log_min_p = float(torch.tensor(sampling.min_p).log()) if sampling.min_p else 0.0
    threshold_kernel[(1,)](
        logits.to(DEVICE), out, 37, sampling.top_k, sampling.top_p, log_min_p,
        TOP_K=sampling.top_k > 0, TOP_P=sampling.top_p < 1, MIN_P=sampling.min_p > 0, BLOCK=16,
    )  # fmt: skip
    kept = processed_logits(logits[None], sampling)[0].isfinite()
    assert torch.equal(logits >= out.cpu(), kept)


def kept_by_sorting(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What the filters keep, by sorting in float64."""
    z, largest = logits.double(), logits.double().max()
    kept = z > float("-inf")
    if sampling.top_k:
        kept &= z >= z.sort(descending=True).values[min(sampling.top_k, len(z)) - 1]
    if sampling.top_p < 1:
        values, counts = z[kept].unique(return_counts=True)  # in rising order
        weight = (values - largest).exp() * counts
        above = weight.sum() - weight.cumsum(0)
        kept &= z >= values[above < sampling.top_p * weight.sum()][0]
    if sampling.min_p:
        kept &= z >= largest + torch.tensor(sampling.min_p).log()
    return kept


def rows(name: str, num_ids: int) -> torch.Tensor:
    z = torch.randn(num_ids, generator=torch.Generator().manual_seed(num_ids))
    if name == "ties":
        return (z * 2).round() / 2
    if name == "equal":
        return torch.full_like(z, -3.5)
    if name == "none":  # -inf but for a few
        return torch.where(z > 0.3, z, float("-inf")).index_fill(0, torch.tensor([num_ids // 2]), 2.25)
    if name == "far":  # thresholds about 0, and a slot whose logits are all likelier than the rest
        z = z * 1e-20
        z[::16] += 2
        return z.index_fill(0, torch.tensor([0]), 40.0 if num_ids < 3 else 2.5)
    return z * 3


@pytest.mark.parametrize("name", ["normal", "ties", "equal", "none", "far"])
@pytest.mark.parametrize("num_ids", [1, 2, 15, 17, 150])
def test_any_row_is_filtered_as_by_sorting(num_ids: int, name: str) -> None:
    logits = rows(name, num_ids)
    for settings in (
        {"top_k": 1}, {"top_k": num_ids}, {"top_k": max(num_ids // 3, 1)}, {"top_p": 1e-6}, {"top_p": 0.55},
        {"top_p": 0.99999}, {"top_k": max(num_ids - 4, 1), "top_p": 0.83, "min_p": 0.01},
    ):  # fmt: skip
        check_threshold(logits, Sampling(**settings), 16)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"top_k": 40}, {"top_p": 0.9}, {"top_k": 5000, "top_p": 0.95}], ids=str)
def test_a_large_vocabulary_is_filtered_as_by_sorting(settings: dict[str, float]) -> None:
    check_threshold(rows("normal", 50257) / 3, Sampling(**settings), 2048)  # type: ignore[arg-type]


def check_threshold(logits: torch.Tensor, sampling: Sampling, block: int) -> None:
    out = torch.full((1,), float("nan"), device=DEVICE)
    log_min_p = float(torch.tensor(sampling.min_p).log()) if sampling.min_p else 0.0
    threshold_kernel[(1,)](
        logits.to(DEVICE), out, len(logits), sampling.top_k, sampling.top_p, log_min_p,
        TOP_K=sampling.top_k > 0, TOP_P=sampling.top_p < 1, MIN_P=sampling.min_p > 0, BLOCK=block,
    )  # fmt: skip
    kept = (logits >= out.cpu()) & logits.isfinite()
    assert torch.equal(kept, kept_by_sorting(logits, sampling)), sampling
