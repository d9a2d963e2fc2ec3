"""Tokens drawn from int8 weights, against the model itself with its matrices rounded where they stand."""

import copy
import dataclasses

import brains
import pytest
import torch

from kernels.generate.fused import _turn_scales
from kernels.generate.layout import BrainShape
from kernels.generate.limits import check_quantized
from kernels.generate.matrix_order import CORTEX_IN, MLP_IN
from kernels.generate.quantized import dequantized, quantize_rows
from kernels.generate.tiles import choose_packets
from kernels.generate.turns import in_pieces
from kernels.generate.weight_bytes import BYTE_SUM, as_bytes
from kernels.sample import Sampling
from neurogen import NeuroGen
from neurogen.baselines import GPT, GPTConfig
from neurogen.errors import UserError
from neurogen.generation import Request
from neurogen.generation.fit import fits_launch
from neurogen.generation.launch import generate_in_one_launch, launch_or_loop
from neurogen.generation.loop import PolledReader, token_loop
from neurogen.generation.packing import pack_brain, packed_brain
from neurogen.training.rounding import round_weights

PAIRED = (CORTEX_IN.value, MLP_IN.value)
# 48 channels are a tile of 32 and half a one.
BRAINS: dict[str, dict] = {
    "plain": {},
    "an odd width, delta, binary": {"embedding_dim": 48, "memory_rule": "delta", "spike": "binary"},
}
SLOW_BRAINS: dict[str, dict] = {
    "columns wider than heads, two gated layers": {"embedding_dim": 64, "column_width": 32, "broca_depth": 2},
    "no gates": {"go_gate": False, "lateral": False, "wernicke_depth": 2, "pfc_depth": 0},
    "no layers": {"wernicke_depth": 0, "hippocampus_depth": 0, "pfc_depth": 0, "broca_depth": 0},
    "an odd mlp": {"embedding_dim": 48, "mlp_ratio": 3.5},
}


def rounded(model: NeuroGen) -> NeuroGen:
    """A copy with its matrices rounded, and its embedding as it was."""
    model = copy.deepcopy(model)
    round_weights(model, "int8")
    return model


def make_request(model: NeuroGen, num_tokens: int, top_p: float = 1.0) -> Request:
    """One token read from a state that unrounded weights made, as a prompt's last one is."""
    ids = torch.tensor(brains.random_prompts([5])).to(model.device)
    with torch.no_grad():
        state = model.forward(ids[:, :-1]).state
    return Request(ids[:, -1:], num_tokens, Sampling(top_p=top_p), 11, (), state, weights="int8")


def check(model: NeuroGen, num_tokens: int, backend: str = "fused", top_p: float = 1.0) -> None:
    request = make_request(model, num_tokens, top_p)
    ours = generate_in_one_launch(model, request, backend=backend)
    with torch.no_grad():
        expected = token_loop(rounded(model), request, PolledReader(request, model.device))
        unrounded = token_loop(model, request, PolledReader(request, model.device))
    assert torch.equal(ours.tokens, expected.tokens)
    torch.testing.assert_close(ours.log_probs, expected.log_probs, rtol=0, atol=1e-5)
    error = float((unrounded.log_probs - expected.log_probs).abs().max())
    assert error > 1e-4, "rounding must be felt for this to show anything"
    for name, x in expected.state.tensors().items():
        difference = (ours.state.tensors()[name].double() - x.double()).norm() / (x.double().norm() + 1e-12)
        assert difference <= 2e-5, (name, float(difference))


@pytest.mark.parametrize("name", [*BRAINS, *SLOW_BRAINS])
def test_the_definition_is_the_rounded_model(name: str) -> None:
    check(brains.small_brain(**{**BRAINS, **SLOW_BRAINS}[name]), 12, "reference")


@pytest.mark.parametrize("name", list(BRAINS))
def test_the_launch_is_the_rounded_model(name: str) -> None:
    check(brains.small_brain(**BRAINS[name]), 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SLOW_BRAINS))
def test_the_launch_is_the_rounded_model_in_odd_brains(name: str) -> None:
    check(brains.small_brain(**SLOW_BRAINS[name]), 4, top_p=0.9)


@pytest.mark.slow
def test_small_tiles_cut_rows_and_channels_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.generate.tiles._INTERPRETED_TILE", 32)
    check(brains.small_brain(embedding_dim=80, mlp_ratio=3.5, vocab_size=67), 2)


@pytest.mark.parametrize("num_programs", [1, 5, 132])
def test_bytes_and_scales_of_every_turn_give_the_rounded_rows_back(num_programs: int) -> None:
    brain = pack_brain(brains.small_brain(embedding_dim=48, vocab_size=263), weights="int8")
    tiles = choose_packets(brain.shape, torch.int8, num_programs)
    plain = dequantized(brain)
    cut = (tiles.R, tiles.WARPS, tiles.G)
    table = tiles.turns(brain.shape)
    scales = _turn_scales(brain, table, tiles.R)
    stored = in_pieces(brain.shape, brain.matrices, brain.decoder, *cut)
    floats = (as_bytes(stored.clone()).int() << 16).view(torch.float32).double() - 128 * 2.0**-133
    expected = in_pieces(plain.shape, plain.matrices, plain.decoder, *cut)
    of_warp = tiles.R // tiles.WARPS
    for program, (num_portions, num_turns) in enumerate(table.counts.tolist()):
        portions = iter(table.portions[program, :num_portions].tolist())
        waiting = []
        for turn, use in enumerate(table.turns[program, :num_turns].tolist()):
            waiting += [next(portions) for _ in range(use >> 60 & 7)]
            if not use & 2:
                continue
            # Portions that leave together: of one block or matrix the first scales, of the other the second.
            half = (
                len(waiting) // 2 if use >> 4 & 7 in PAIRED or (len(waiting) == 2 and not use & 128) else len(waiting)
            )
            for i, fetch in enumerate(waiting):
                first, stride, count = fetch & 0xFFFFFFFF, fetch >> 32 & 0xFFFF, fetch >> 48
                for row in range(tiles.R):
                    piece = first + row // of_warp * stride
                    scale = scales[program, turn, i // half, row].double() / BYTE_SUM * 2.0**133
                    ours = floats[piece : piece + count, row % of_warp] * scale
                    torch.testing.assert_close(
                        ours.float(), expected[piece : piece + count, row % of_warp], rtol=1e-6, atol=1e-9
                    )
            waiting = []
        assert next(portions, None) is None


def test_rows_are_rounded_as_an_evaluation_rounds_them() -> None:
    weight = torch.randn(4, 9) * torch.tensor([[1e-3], [0], [1], [50]])
    bytes_, scale = quantize_rows(weight)
    assert bytes_.dtype == torch.int8
    assert int(bytes_.min()) >= -127
    assert scale.dtype == torch.float32
    assert ((bytes_ * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    assert not bytes_[1].any()
    assert float(scale[1]) == 0


def test_the_rounded_copy_is_kept_and_follows_a_change() -> None:
    model = brains.small_brain(mode="fused")
    kept = [packed_brain(model, weights="int8") for _ in range(2)][-1]
    assert packed_brain(model, weights="int8") is kept
    assert kept.matrices.dtype == kept.decoder.dtype == torch.int8
    assert packed_brain(model).matrices.dtype == torch.float32
    kept = [packed_brain(model, weights="int8") for _ in range(2)][-1]
    before = model.generate([[3]], max_new_tokens=1, weights="int8").log_probs
    with torch.no_grad():
        model.decoder.weight.normal_()
    assert packed_brain(model, weights="int8") is not kept
    after = model.generate([[3]], max_new_tokens=1, weights="int8").log_probs
    expected = rounded(model).generate([[3]], max_new_tokens=1).log_probs
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
    assert not torch.equal(after, before)


def test_a_stream_draws_what_one_call_draws() -> None:
    model = brains.small_brain(mode="fused", pfc_depth=0, broca_depth=0)
    whole = model.generate(torch.tensor([[3, 1]]), max_new_tokens=3, seed=2, weights="int8")
    pieces = list(model.generate_stream([[3, 1]], max_new_tokens=3, chunk_tokens=2, seed=2, weights="int8"))
    assert torch.equal(torch.cat([piece.tokens for piece in pieces], 1), whole.tokens)
    log_probs = torch.cat([piece.log_probs for piece in pieces], 1)
    torch.testing.assert_close(log_probs, whole.log_probs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ({}, {"weights": "int4"}, "weights is 'int4'; choose int8"),
        ({"mode": "unfused"}, {}, "weights=int8: is for mode=fused, not unfused"),
        ({}, {"input_ids": [[1], [2]]}, "weights=int8: is for 1 lane, not 2; ask for one reply"),
        ({"head_width": 8}, {}, "weights=int8: needs one launch: generate: head_width is 8"),
        ({"token_shift": 2}, {}, "weights=int8: needs one launch: it has no model.token_shift"),
    ],
)
def test_what_is_not_to_be_had_is_one_line(model: dict, arguments: dict, words: str) -> None:
    brain = brains.small_brain(**{"mode": "fused", **model})
    arguments = {"input_ids": [[1]], "weights": "int8", "max_new_tokens": 1, **arguments}
    for call in (brain.generate, brain.generate_stream):  # a stream says so at once, not at its first piece
        with pytest.raises(UserError, match=words) as error:
            call(**arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=words):
        brain.generate(**{**arguments, "input_ids": torch.tensor(arguments["input_ids"])})


def test_a_gpt_has_none() -> None:
    with pytest.raises(UserError, match="weights=int8: only a brain's matrices are rounded"):
        GPT(GPTConfig(32, 1, 16), vocab_size=11).generate(torch.tensor([[1]]), weights="int8")


def test_a_device_too_small_is_an_error_and_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("too many blocks in cooperative launch")

    monkeypatch.setattr("neurogen.generation.launch.generate", refuse)
    model = brains.small_brain()
    with pytest.raises(UserError, match="weights=int8: needs one launch: too many blocks"):
        launch_or_loop(model, make_request(model, 2))


def test_a_brain_too_wide_for_one_lane_is_named() -> None:
    shape = BrainShape(4096, 128, 128, 12288, 257, 1, 1, 1)
    with pytest.raises(ValueError, match="mlp_width 12288 are too much for int8 weights"):
        check_quantized(shape, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="2 lanes; int8 weights are for one"):
        check_quantized(dataclasses.replace(shape, mlp_width=4096), 2, torch.device("cpu"))


def test_an_older_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = brains.small_brain(mode="fused")
    monkeypatch.setattr(NeuroGen, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    words = (
        "weights=int8: needs one launch: generate: the GPU has compute capability 8.9; int8 weights need 9.0 or more"
    )
    with pytest.raises(UserError, match=words):
        model.generate([[3]], max_new_tokens=1, weights="int8")
    assert fits_launch(model) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*BRAINS, *SLOW_BRAINS])
def test_the_launch_is_the_rounded_model_on_a_gpu(name: str) -> None:
    check(brains.small_brain(**{**BRAINS, **SLOW_BRAINS}[name]).cuda(), 50)


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["nano", "small", "base"])
def test_bfloat16_log_probs_at_forced_positions(size: str) -> None:
    """The launch's own tokens, read again by the float32 model with rounded matrices, as one sequence."""
    width, column, head = {"nano": (128, 64, 64), "small": (512, 64, 64), "base": (1536, 128, 128)}[size]
    model = brains.small_brain(
        vocab_size=1031, embedding_dim=width, column_width=column, head_width=head, hippocampus_depth=2, pfc_depth=2
    ).cuda()
    request = make_request(model, 128)
    with torch.autocast("cuda", torch.bfloat16):
        ours = generate_in_one_launch(model, request)
    with torch.no_grad():
        ids = torch.cat([request.input_ids, ours.tokens], 1)
        logits = rounded(model).forward(ids[:, :-1], request.state).logits
        assert logits is not None
        log_probs = logits.log_softmax(-1)
        forced = log_probs.gather(-1, ours.tokens[..., None])[..., 0]
    assert (forced - ours.log_probs).norm() / forced.norm() < 2e-2
