"""The relay's definition against per-token loops written from its formula."""

import math

import pytest
import torch
from torch import Tensor

from kernels.relay import NO_TOKEN, relay
from kernels.relay.reference import relay_reference

EPS = 1e-6


def relay_by_token(
    input_ids: Tensor, embedding: Tensor, taps: Tensor, recent_ids: Tensor, document_start: Tensor
) -> tuple[list, list]:
    """Nested lists of x and carried ids: each lane keeps a list of the ids its document has shown, newest first."""
    num_taps, width = taps.shape
    x, carried = [], []
    for lane in range(input_ids.shape[0]):
        shown = [i for i in recent_ids[lane].tolist() if i != NO_TOKEN][::-1]
        rows = []
        for t in range(input_ids.shape[1]):
            if document_start[lane, t]:
                shown = []
            shown.insert(0, int(input_ids[lane, t]))
            total = [0.0] * width
            for j, token in enumerate(shown[:num_taps]):
                row = embedding[token].tolist()
                rms = math.sqrt(sum(r * r for r in row) / width + EPS)
                total = [s + float(taps[j, d]) * row[d] / rms for d, s in enumerate(total)]
            rows.append(total)
        x.append(rows)
        kept = shown[: num_taps - 1][::-1]
        carried.append([NO_TOKEN] * (num_taps - 1 - len(kept)) + kept)
    return x, carried


def make_inputs(*, lanes=3, num_tokens=9, width=5, vocab_size=7, num_taps=4, starts=0.3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocab_size, (lanes, num_tokens), generator=generator)
    embedding = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64).to(dtype)
    taps = torch.randn(num_taps, width, generator=generator, dtype=torch.float64).to(dtype)
    recent_ids = torch.randint(vocab_size, (lanes, num_taps - 1), generator=generator)
    if lanes > 1:
        recent_ids[1, : (num_taps - 1) // 2 + 1] = NO_TOKEN
    document_start = torch.rand(lanes, num_tokens, generator=generator) < starts
    return input_ids, embedding, taps, recent_ids, document_start


@pytest.mark.parametrize("starts", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("num_tokens", "num_taps"), [(9, 4), (1, 4), (2, 4), (5, 1), (6, 2)])
def test_matches_loop_over_tokens(num_tokens, num_taps, starts):
    inputs = make_inputs(num_tokens=num_tokens, num_taps=num_taps, starts=starts)
    x, carried = relay_reference(*inputs, eps=EPS)
    expected_x, expected_carried = relay_by_token(*inputs)
    torch.testing.assert_close(x, torch.tensor(expected_x, dtype=torch.float64))
    assert carried.tolist() == expected_carried


def test_no_mask_means_no_start():
    input_ids, embedding, taps, recent_ids, _ = make_inputs()
    without = relay_reference(input_ids, embedding, taps, recent_ids)
    masked = relay_reference(input_ids, embedding, taps, recent_ids, torch.zeros_like(input_ids, dtype=torch.bool))
    assert torch.equal(without[0], masked[0])
    assert torch.equal(without[1], masked[1])


@pytest.mark.parametrize("cuts", [[4], [1, 2, 3], [0, 8], list(range(1, 9))])
def test_pieces_with_carried_ids_make_the_whole(cuts):
    input_ids, embedding, taps, recent_ids, document_start = make_inputs()
    whole, final_ids = relay_reference(input_ids, embedding, taps, recent_ids, document_start)
    pieces = []
    for first, last in zip([0, *cuts], [*cuts, 9], strict=True):
        x, recent_ids = relay_reference(
            input_ids[:, first:last], embedding, taps, recent_ids, document_start[:, first:last]
        )
        pieces.append(x)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert torch.equal(recent_ids, final_ids)


def test_packed_documents_equal_documents_alone():
    input_ids, embedding, taps, _, _ = make_inputs(lanes=1, num_tokens=8)
    nothing = torch.full((1, 3), NO_TOKEN)
    document_start = torch.zeros(1, 8, dtype=torch.bool)
    document_start[0, [0, 3, 4]] = True
    packed, _ = relay_reference(input_ids, embedding, taps, nothing, document_start)
    alone = [relay_reference(piece, embedding, taps, nothing)[0] for piece in input_ids.split([3, 1, 4], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


def test_gradients():
    input_ids, embedding, taps, recent_ids, document_start = make_inputs(num_tokens=4, width=3)
    assert torch.autograd.gradcheck(
        lambda e, w: relay_reference(input_ids, e, w, recent_ids, document_start)[0],
        (embedding.requires_grad_(), taps.requires_grad_()),
    )


def test_empty_sequence_carries_ids_on():
    input_ids, embedding, taps, recent_ids, document_start = make_inputs()
    x, carried = relay_reference(input_ids[:, :0], embedding, taps, recent_ids, document_start[:, :0])
    assert x.shape == (3, 0, 5)
    assert torch.equal(carried, recent_ids)


def test_out_dtype():
    inputs = make_inputs(dtype=torch.float32)
    assert relay(*inputs)[0].dtype == torch.float32
    half = relay(*inputs, out_dtype=torch.bfloat16)[0]
    assert torch.equal(half, relay(*inputs)[0].bfloat16())
