"""Draws against published vectors and exact probabilities, filters against an implementation that sorts."""

import math

import numpy as np
import pytest
import torch

from kernels.sample import Sampling, processed_logits, sample, sample_logits
from kernels.sample.philox import exponential, philox

NUM_DRAWS = 200_000


def philox_4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(product1 >> 32) ^ c[1] ^ k[0], product1 % 2**32, (product0 >> 32) ^ c[3] ^ k[1], product0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


# The known-answer vectors that are distributed with Random123, for philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_published_vectors(counter, key, answer):
    counter, key, answer = ([int(word, 16) for word in words.split()] for words in (counter, key, answer))
    assert philox_4x32_10(counter, key) == answer


def test_first_published_vector():
    zero = torch.zeros((), dtype=torch.int64)
    assert philox(0, zero, zero, zero).item() == 0x6627E8D5


def test_philox_matches_unbounded_integers():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(-(2**62), 2**62, (3, 50), generator=generator)
    for seed in (0, 1, -1, 2**64 - 1, 0x0123456789ABCDEF, 2**70 + 5):
        key = [seed % 2**32, (seed >> 32) % 2**32]
        expected = [philox_4x32_10([c % 2**32 for c in triple] + [0], key)[0] for triple in counters.t().tolist()]
        assert philox(seed, *counters).tolist() == expected


def test_exponential_draws():
    words = torch.tensor([0, 1, 1000, 2**26 - 1, 2**26, 2**26 + 1, 2**31, 2**32 - 2, 2**32 - 1])
    exact = [-math.log1p(-(w + 0.5) / 2**32) for w in words.tolist()]
    draws = exponential(words)
    assert draws.dtype == torch.float32
    # The last words are cut off at 1 - 2^-24, so that no draw is infinite.
    torch.testing.assert_close(draws[:-2], torch.tensor(exact)[:-2], rtol=3e-6, atol=0)
    assert draws[-2:].tolist() == pytest.approx([24 * math.log(2)] * 2, rel=1e-6)


def exact_probabilities(logits: np.ndarray, sampling: Sampling, seen: np.ndarray | None = None) -> np.ndarray:
    """Distribution of one lane in float64, by sorting; tokens tied with the last one kept stay."""
    z = logits.astype(np.float64)
    if seen is not None:
        p = sampling.repetition_penalty
        z = np.where(seen, np.where(z > 0, z / p, z * p), z)
    z = z / sampling.temperature
    order = sorted(range(len(z)), key=lambda i: -z[i])
    if sampling.top_k:
        kept = order[: sampling.top_k]
        z = np.where(z >= z[kept[-1]], z, -np.inf)
    probs = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    if sampling.top_p < 1:
        mass, kept = 0.0, []
        for i in order:
            if mass >= sampling.top_p:
                break
            kept.append(i)
            mass += probs[i]
        z = np.where(z >= z[kept[-1]], z, -np.inf)
    if sampling.min_p:
        z = np.where(probs >= sampling.min_p * probs.max() * (1 - 1e-6), z, -np.inf)
    probs = np.exp(z - z.max())
    return probs / probs.sum()


STRATEGIES = {
    "plain": Sampling(),
    "cold": Sampling(temperature=0.5),
    "hot": Sampling(temperature=3.0),
    "top-k": Sampling(top_k=3),
    "top-p": Sampling(top_p=0.7),
    "min-p": Sampling(min_p=0.2),
    "all": Sampling(repetition_penalty=1.3, temperature=1.2, top_k=6, top_p=0.9, min_p=0.02),
}


@pytest.mark.parametrize("sampling", STRATEGIES.values(), ids=STRATEGIES)
def test_draws_follow_the_distribution(sampling):
    logits = torch.tensor([1.2, 0.3, -0.5, 2.0, 0.9, -2.5, 0.1, -0.1])
    seen = torch.tensor([True, False, True, True, False, False, False, True])
    probs = exact_probabilities(logits.numpy(), sampling, seen.numpy())
    out = sample_logits(
        logits.expand(NUM_DRAWS, -1),
        sampling,
        seed=5,
        lanes=torch.full((NUM_DRAWS,), 3),
        positions=torch.arange(NUM_DRAWS),
        seen=seen.expand(NUM_DRAWS, -1),
    )
    counts = out.tokens.bincount(minlength=8).double().numpy()
    assert not counts[probs == 0].any()
    expected = probs[probs > 0] * NUM_DRAWS
    chi_square = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    p_value = torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(chi_square / 2))
    assert p_value > 1e-3


def test_draws_depend_on_seed_lane_and_position_alone():
    logits = torch.zeros(4, 1000)
    arguments = {"lanes": torch.arange(4), "positions": torch.tensor([7, 8, 9, 10])}
    together = sample_logits(logits, Sampling(), seed=1, **arguments).tokens
    alone = [
        sample_logits(logits[:1], Sampling(), seed=1, lanes=torch.tensor([i]), positions=torch.tensor([7 + i])).tokens
        for i in range(4)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert len(set(together.tolist())) == 4
    assert not torch.equal(together, sample_logits(logits, Sampling(), seed=2, **arguments).tokens)
    assert not torch.equal(together, sample_logits(logits, Sampling(), seed=1 + 2**32, **arguments).tokens)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=1),
        Sampling(top_k=7),
        Sampling(top_k=40),
        Sampling(top_k=1000),
        Sampling(top_p=1e-6),
        Sampling(top_p=0.5),
        Sampling(top_p=0.999),
        Sampling(min_p=0.3),
        Sampling(min_p=1.0),
        Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.01),
    ],
    ids=str,
)
def test_filters_keep_the_right_tokens(sampling):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20, 40)).astype(np.float32) * 2
    logits[:5] = np.round(logits[:5])  # ties
    processed = processed_logits(torch.from_numpy(logits), sampling)
    for lane in range(20):
        expected = exact_probabilities(logits[lane], sampling)
        assert (processed[lane] > -math.inf).tolist() == (expected > 0).tolist()
        np.testing.assert_allclose(processed[lane].double().softmax(-1).numpy(), expected, rtol=1e-5)


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    processed = processed_logits(logits, Sampling(repetition_penalty=2.0), seen)
    assert processed.tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_greedy_takes_the_likeliest_after_the_penalty():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    seen = torch.tensor([[True, False, False]])
    where = {"seed": 0, "lanes": torch.zeros(1, dtype=torch.int64), "positions": torch.zeros(1, dtype=torch.int64)}
    assert sample_logits(logits, Sampling(temperature=0), **where).tokens.tolist() == [0]
    penalized = sample_logits(logits, Sampling(temperature=0, repetition_penalty=2.0), seen=seen, **where)
    assert penalized.tokens.tolist() == [1]
    # Log-probabilities are the model's own.
    assert penalized.log_probs.item() == pytest.approx(2 - math.log(math.exp(3) + math.exp(2) + math.exp(1)))


def test_hidden_states_are_decoded():
    hidden, weight = torch.randn(3, 5), torch.randn(11, 5)
    where = {"seed": 4, "lanes": torch.arange(3), "positions": torch.arange(3)}
    out = sample(hidden, weight, Sampling(), **where)
    expected = sample_logits(hidden @ weight.t(), Sampling(), **where)
    assert torch.equal(out.tokens, expected.tokens)
    torch.testing.assert_close(out.log_probs, expected.log_probs)


@pytest.mark.parametrize(
    ("field", "value"),
    [("repetition_penalty", 0.0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 2.0)],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Sampling(**{field: value})
