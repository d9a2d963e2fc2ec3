"""Sampling in launches against its definition: the same words, thresholds and tokens."""

import pytest
import torch
import triton
import triton.language as tl
from fused_checks import poison_new_memory

from kernels.sample import Sampling, sample
from kernels.sample.device import exponential_draw, philox_word
from kernels.sample.fused import sample_forward
from kernels.sample.philox import exponential, philox


@triton.jit
def draw_kernel(counter_ptr, word_ptr, draw_ptr, seed_low, seed_high, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + offsets).to(tl.int32)
    c1 = tl.load(counter_ptr + BLOCK + offsets).to(tl.int32)
    c2 = tl.load(counter_ptr + 2 * BLOCK + offsets).to(tl.int32)
    word = philox_word(seed_low, seed_high, c0, c1, c2)
    tl.store(word_ptr + offsets, word.to(tl.int64))
    tl.store(draw_ptr + offsets, exponential_draw(word))


def check_words(device):
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(-(2**62), 2**62, (3, 256), generator=generator)
    counters[:, 0] = 0
    words = torch.empty(256, dtype=torch.int64, device=device)
    draws = torch.empty(256, device=device)
    for low, high in ((0, 0), (-1, -1), (0x243F6A88, -1542899678)):
        draw_kernel[(1,)](counters.to(device), words, draws, low, high, BLOCK=256)
        expected = philox(low % 2**32 + (high % 2**32 << 32), *counters)
        assert torch.equal(words.cpu(), expected)
        torch.testing.assert_close(draws.cpu(), exponential(expected), rtol=1e-6, atol=0)


def test_words_of_the_generator():
    check_words("cpu")


def make_inputs(*, lanes=5, width=20, vocab_size=77, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(lanes, width, generator=generator)
    weight = torch.randn(vocab_size, width, generator=generator) * 2 / width**0.5
    arguments = {
        "seed": -12345678901234567,
        "lanes": torch.randint(2**33, (lanes,), generator=generator),
        "positions": torch.randint(2**33, (lanes,), generator=generator),
        "seen": torch.rand(lanes, vocab_size, generator=generator) < 0.4,
    }
    arguments = {name: z.to(device) if isinstance(z, torch.Tensor) else z for name, z in arguments.items()}
    return hidden.to(device, dtype), weight.to(device, dtype), arguments


STRATEGIES = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(repetition_penalty=1.3, temperature=0),
    Sampling(repetition_penalty=1.5, temperature=0.7),
    Sampling(top_k=1),
    Sampling(top_k=5),
    Sampling(top_k=200),
    Sampling(top_p=1e-6),
    Sampling(top_p=0.6),
    Sampling(min_p=0.1),
    Sampling(1.3, 0.8, 20, 0.9, 0.05),
]


@pytest.mark.parametrize("sampling", STRATEGIES, ids=str)
def test_same_tokens(sampling, monkeypatch):
    hidden, weight, arguments = make_inputs()
    poison_new_memory(monkeypatch)
    out = sample(hidden, weight, sampling, backend="fused", **arguments)
    monkeypatch.undo()
    expected = sample(hidden, weight, sampling, **arguments)
    assert torch.equal(out.tokens, expected.tokens)
    torch.testing.assert_close(out.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        {"lanes": 1, "width": 3, "vocab_size": 1},
        {"lanes": 17, "width": 70, "vocab_size": 130},
        {"lanes": 2, "width": 4, "vocab_size": 8200},
    ],
    ids=str,
)
def test_shapes(shape):
    hidden, weight, arguments = make_inputs(**shape)
    sampling = Sampling(repetition_penalty=1.2, temperature=0.9)
    out = sample(hidden, weight, sampling, backend="fused", **arguments)
    expected = sample(hidden, weight, sampling, **arguments)
    assert torch.equal(out.tokens, expected.tokens)
    torch.testing.assert_close(out.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(top_k=3), Sampling(top_p=0.5), Sampling(min_p=1.0)], ids=str)
def test_ties_with_the_last_token_kept_stay(sampling):
    """Ids 0, 2, 4 are the likeliest by far and equally so; 24 lanes between them draw each of those and no other."""
    weight = torch.tensor([[9.0], [0], [9], [0], [9], [-1]])
    arguments = {"seed": 3, "lanes": torch.arange(24), "positions": torch.zeros(24, dtype=torch.int64)}
    tokens = sample(torch.ones(24, 1), weight, sampling, backend="fused", **arguments).tokens
    assert tokens.unique().tolist() == [0, 2, 4]


def test_not_contiguous():
    hidden, weight, arguments = make_inputs()
    out = sample(
        hidden.t().contiguous().t(),
        weight.t().contiguous().t(),
        Sampling(repetition_penalty=1.2),
        backend="fused",
        **{**arguments, "seen": arguments["seen"].t().contiguous().t()},
    )
    assert torch.equal(out.tokens, sample(hidden, weight, Sampling(repetition_penalty=1.2), **arguments).tokens)


def test_no_lanes():
    hidden, weight, arguments = make_inputs(lanes=0)
    out = sample(hidden, weight, Sampling(), backend="fused", **arguments)
    assert (out.tokens.shape, out.log_probs.shape) == ((0,), (0,))


def test_operator_is_well_formed():
    hidden, weight, arguments = make_inputs(lanes=2)
    where = (arguments["seed"], arguments["lanes"], arguments["positions"], arguments["seen"])
    torch.library.opcheck(sample_forward, (hidden, weight, 1.2, 0.9, 0, 1.0, 0.0, *where))


def test_refuses_float64():
    hidden, weight, arguments = make_inputs(dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        sample(hidden, weight, Sampling(), backend="fused", **arguments)


@pytest.mark.gpu
def test_words_of_the_generator_on_gpu():
    check_words("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", STRATEGIES, ids=str)
@pytest.mark.parametrize("lanes", [1, 33])
@pytest.mark.parametrize(("width", "vocab_size"), [(128, 256), (1536, 50257)])
def test_same_tokens_on_gpu(width, vocab_size, lanes, sampling):
    hidden, weight, arguments = make_inputs(lanes=lanes, width=width, vocab_size=vocab_size, device="cuda")
    out = sample(hidden, weight, sampling, backend="fused", **arguments)
    expected = sample(hidden, weight, sampling, **arguments)
    # Logits differ in their last bits, so two scores that are all but equal may change places.
    assert (out.tokens != expected.tokens).sum() <= 1
    agree = out.tokens == expected.tokens
    torch.testing.assert_close(out.log_probs[agree], expected.log_probs[agree], rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_bfloat16_on_gpu():
    """Greedy tokens are as likely as the reference's, up to the rounding of its logits."""
    hidden, weight, arguments = make_inputs(lanes=33, width=1536, vocab_size=50257, dtype=torch.bfloat16, device="cuda")
    out = sample(hidden, weight, Sampling(temperature=0), backend="fused", **arguments)
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1)
    assert torch.equal(out.tokens, exact.argmax(-1))
    chosen = exact.gather(-1, out.tokens[:, None])[:, 0]
    torch.testing.assert_close(out.log_probs.double(), chosen, rtol=1e-4, atol=1e-3)
