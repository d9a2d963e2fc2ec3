"""Evaluation against a token-by-token count, and the small formulas beside it."""

import itertools
import math

import numpy as np
import pytest
import torch

from neurogen import BrainConfig, NeuroGen
from neurogen.data import BpeTokenizer, ByteTokenizer, Tokenizer, TokenStream
from neurogen.training.evaluation import Evaluation, evaluate
from neurogen.training.flops import model_flops_utilization, peak_flops, peak_memory_bytes
from neurogen.training.precision import Precision

CPU64 = Precision(torch.device("cpu"), "float64")


def make_model(vocab_size: int, *, dropout: float = 0.0) -> NeuroGen:
    torch.manual_seed(0)
    config = BrainConfig(embedding_dim=16, column_width=8, head_width=8, chunk_size=4, dropout=dropout)
    model = NeuroGen(config, vocab_size=vocab_size).double()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model


def make_stream(tokenizer: Tokenizer, texts: list[str]) -> TokenStream:
    pieces = [[tokenizer.document_start_id, *tokenizer.encode(text).tolist()] for text in texts]
    offsets = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
    tokens = np.array([token for piece in pieces for token in piece], dtype=np.uint16)
    return TokenStream(tokens, offsets.astype(np.int64), tokenizer.document_start_id, "x", "validation")


def naive(
    model: NeuroGen, stream: TokenStream, num_bytes: np.ndarray, *, lanes: int, context: int | None, limit: int
) -> tuple[float, int, int, int]:
    """nats, targets, hits and bytes, one token and one lane at a time, with a new state every `context` tokens."""
    ids = stream.tokens.astype(np.int64)
    nats, hits, size = 0.0, 0, 0
    bounds = [lane * limit // lanes for lane in range(lanes + 1)]
    for start, end in itertools.pairwise(bounds):
        state = model.init_state(1)
        for i in range(start, end):
            if ids[i] == stream.document_start_id or i == 0 or (context and (i - start) % context == 0):
                state = model.init_state(1)
            logits, state = model.step(torch.tensor([ids[i]]), state)
            nats -= float(torch.log_softmax(logits[0], 0)[ids[i + 1]])
            hits += int(logits[0].argmax()) == ids[i + 1]
            size += int(num_bytes[ids[i + 1]])
    return nats, limit, hits, size


@pytest.mark.parametrize(("lanes", "max_tokens"), [(1, None), (3, None), (4, 37), (64, 40)])
@pytest.mark.parametrize("carry", [True, False])
def test_evaluation_is_the_naive_count(lanes: int, max_tokens: int | None, carry: bool) -> None:
    tokenizer = ByteTokenizer()
    stream = make_stream(tokenizer, ["def f(x):\n", "a", "import os, sys\nprint(os)\n", "été"])
    model = make_model(tokenizer.vocab_size)
    limit = min(max_tokens or len(stream), len(stream) - 1)
    with torch.no_grad():
        nats, targets, hits, size = naive(
            model, stream, tokenizer.token_num_bytes(), lanes=max(1, min(lanes, limit // 7)),
            context=None if carry else 7, limit=limit,
        )  # fmt: skip
    result = evaluate(
        model, stream, tokenizer, lanes=lanes, window=7, precision=CPU64, max_tokens=max_tokens, carry_state=carry
    )
    assert result.nats == pytest.approx(nats, rel=1e-10)
    assert (result.num_targets, result.num_correct, result.num_bytes) == (targets, hits, size)


@pytest.mark.parametrize("context", [7, 14, 21])
def test_a_context_of_several_windows(context: int) -> None:
    tokenizer = ByteTokenizer()
    stream = make_stream(tokenizer, ["def f(x):\n    return x\n", "import os, sys\nprint(os)\n"])
    model = make_model(tokenizer.vocab_size)
    limit = len(stream) - 1
    with torch.no_grad():
        expected = naive(model, stream, tokenizer.token_num_bytes(), lanes=limit // 21, context=context, limit=limit)
    lanes = limit // 21  # as many as the longest context leaves
    result = evaluate(model, stream, tokenizer, lanes=lanes, window=7, precision=CPU64, context=context)
    assert result.nats == pytest.approx(expected[0], rel=1e-10)
    reset = evaluate(model, stream, tokenizer, lanes=lanes, window=7, precision=CPU64, carry_state=False)
    assert (result.nats == pytest.approx(reset.nats, rel=1e-12)) == (context == 7)


def test_it_reads_without_dropout_and_leaves_the_model_training() -> None:
    tokenizer = ByteTokenizer()
    stream = make_stream(tokenizer, ["def f(x):\n    return x\n"])
    models = [make_model(tokenizer.vocab_size, dropout=dropout) for dropout in (0.0, 0.5)]
    before = torch.get_rng_state()
    plain, dropping = (evaluate(model, stream, tokenizer, lanes=2, window=7, precision=CPU64) for model in models)
    assert plain == dropping
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in models[1].modules())


def test_bits_per_byte_counts_bytes_not_tokens() -> None:
    text = "the cat sat on the mat, the cat sat on the hat. " * 4
    tokenizer = BpeTokenizer.train([text], vocab_size=270)
    stream = make_stream(tokenizer, [text])
    result = evaluate(make_model(tokenizer.vocab_size), stream, tokenizer, lanes=2, window=8, precision=CPU64)
    assert result.num_targets == len(stream) - 1 < len(text)
    assert result.num_bytes == len(text)
    assert result.bits_per_byte == pytest.approx(result.loss * result.num_targets / math.log(2) / len(text))


def test_formulas() -> None:
    result = Evaluation(nats=8 * math.log(2), num_targets=4, num_correct=1, num_bytes=16)
    metrics = result.metrics("val")
    assert metrics == {
        "val/loss": pytest.approx(2 * math.log(2)),
        "val/bpb": pytest.approx(0.5),
        "val/perplexity": pytest.approx(4.0),
        "val/accuracy": 0.25,
    }
    assert math.isnan(Evaluation(1.0, 1, 0, 0).bits_per_byte)
    assert Evaluation(1e6, 1, 0, 1).perplexity == math.inf


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_rates_by_device_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_a_cpu_has_memory_but_no_utilization() -> None:
    assert model_flops_utilization(1e6, 1e6, torch.device("cpu")) is None
    assert 50e6 < peak_memory_bytes(torch.device("cpu")) < 1e12
