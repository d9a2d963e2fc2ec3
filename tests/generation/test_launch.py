"""The generating launch against the token loop, which runs the model itself.

Runs in Triton's interpreter, a second or two a token, so brains are tiny and replies short; the slow cases and the GPU
ones widen both.
"""

import dataclasses
import gc
import weakref

import brains
import pytest
import torch

from kernels.generate import PackedState, generate
from kernels.generate.layout import BrainShape
from kernels.generate.limits import check_shape
from kernels.generate.tiles import Block, Tiles, choose_packets, choose_tiles
from kernels.sample import Sampling
from neurogen import NeuroGen
from neurogen.generation import Generation, Request
from neurogen.generation.launch import generate_in_one_launch, launch_or_loop
from neurogen.generation.loop import PolledReader, token_loop
from neurogen.generation.packing import brain_shape, pack_brain, pack_state, packed_brain, unpack_state

PRESETS = {
    "plain": ({}, {}, 1),
    "greedy, two lanes": ({}, {"temperature": 0.0}, 2),
    "delta, binary, all filters": (
        {"memory_rule": "delta", "spike": "binary"},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
        3,
    ),
    "no gates": ({"go_gate": False, "lateral": False, "wernicke_depth": 2, "pfc_depth": 0}, {"top_k": 3}, 4),
}
SLOW_PRESETS = {
    "columns of two sizes": ({"embedding_dim": 64, "column_width": 32, "broca_depth": 2}, {"top_p": 0.5}, 1),
    "memory alone": ({"wernicke_depth": 0, "broca_depth": 0, "memory_rule": "delta"}, {"min_p": 0.2}, 1),
    "cortex alone": ({"hippocampus_depth": 0, "pfc_depth": 0}, {"repetition_penalty": 0.7}, 2),
    "an odd width": ({"embedding_dim": 48}, {"temperature": 1.5}, 1),
    "tied": ({"tie_embedding": True, "embedding_dim": 48, "mlp_ratio": 4.0}, {"temperature": 1.5}, 1),
    "no layers": (
        {"wernicke_depth": 0, "hippocampus_depth": 0, "pfc_depth": 0, "broca_depth": 0},
        {"temperature": 0.0, "repetition_penalty": 2.0},
        1,
    ),
}


def make_request(
    model: NeuroGen, num_lanes: int, num_tokens: int, stop: tuple[int, ...] = (), **sampling: float
) -> Request:
    ids = torch.randint(0, model.vocab_size, (num_lanes, 4), generator=torch.Generator().manual_seed(5))
    state = model.forward(ids.to(model.device)).state
    prompt = torch.tensor(brains.random_prompts([3] * num_lanes))
    return Request(
        input_ids=prompt.to(model.device),
        max_new_tokens=num_tokens,
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
        seed=11,
        stop=stop,
        state=state,
        lanes=torch.arange(num_lanes, device=model.device) * 3 + 1,
    )


def assert_same(ours: Generation, theirs: Generation, tolerance: float = 1e-5) -> None:
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.lengths, theirs.lengths)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0, atol=tolerance)
    mine, reference = ours.state.tensors(), theirs.state.tensors()
    assert mine.keys() == reference.keys()
    for name, x in reference.items():
        error = (mine[name].double() - x.double()).norm() / (x.double().norm() + 1e-12)
        assert error <= tolerance, (name, float(error))


def check(backend: str, changes: dict, sampling: dict, num_lanes: int, num_tokens: int, stop=()) -> Generation:
    model = brains.small_brain(**changes)
    with torch.no_grad():
        request = make_request(model, num_lanes, num_tokens, stop, **sampling)
        expected = token_loop(model, request, PolledReader(request, model.device))
        assert_same(generate_in_one_launch(model, request, backend=backend), expected)
    return expected


@pytest.mark.parametrize("preset", [*PRESETS, *SLOW_PRESETS])
def test_the_definition_is_the_model(preset: str) -> None:
    changes, sampling, num_lanes = {**PRESETS, **SLOW_PRESETS}[preset]
    check("reference", changes, sampling, num_lanes, 12)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_launch_is_the_model(preset: str) -> None:
    check("fused", *PRESETS[preset], 2)


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(SLOW_PRESETS))
def test_the_launch_is_the_model_in_odd_brains(preset: str) -> None:
    check("fused", *SLOW_PRESETS[preset], 4)


@pytest.fixture
def without_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without the copies, or for a brain without room, that the kernel for one lane needs."""
    monkeypatch.setattr("kernels.generate.fused.MAX_ROOM_BYTES", 0)
    monkeypatch.setattr("kernels.generate.fused.packet_kernel", None)


@pytest.mark.usefixtures("without_packets")
def test_one_lane_goes_without_packets() -> None:
    check("fused", {"memory_rule": "delta"}, {"top_p": 0.9}, 1, 2)


MANY_LANES = {
    "plain": ({}, {}, 5, ()),
    "delta, binary, all filters, stop ids": (*PRESETS["delta, binary, all filters"][:2], 9, (3, 4, 5, 6, 7)),
    "an odd width, no gates": ({"embedding_dim": 48, "go_gate": False}, {"top_p": 0.9}, 33, ()),
    "cortex alone": ({"hippocampus_depth": 0, "pfc_depth": 0, "lateral": False}, {"temperature": 0.0}, 64, (1, 2)),
    "no layers": (SLOW_PRESETS["no layers"][0], {"repetition_penalty": 2.0}, 17, ()),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name == "plain" else pytest.mark.slow) for name in MANY_LANES]
)
def test_the_launch_of_many_lanes_is_the_model(case: str) -> None:
    changes, sampling, num_lanes, stop = MANY_LANES[case]
    check("fused", changes, sampling, num_lanes, 2, stop)


@pytest.mark.slow
@pytest.mark.parametrize("block", [Block(64, 1, 16, 2), Block(16, 1, 16, 2), Block(16, 4, 16, 2)])
def test_each_way_to_multiply_is_the_model(monkeypatch: pytest.MonkeyPatch, block: Block) -> None:
    def choose(*args: object, **kwargs: object) -> Tiles:
        narrow = block._replace(rows=min(block.rows, 16))
        tiles = choose_tiles(*args, **kwargs)  # type: ignore[arg-type]
        return dataclasses.replace(tiles, PAIR=narrow, OUT=block, MEMORY=block, MLP=block, DECODE=block)

    monkeypatch.setattr("kernels.generate.fused.choose_tiles", choose)
    check("fused", {"embedding_dim": 48}, {"top_p": 0.9}, 33, 2)


@pytest.mark.parametrize(
    ("unit", "changes"),
    [
        (16, {"head_width": 64, "memory_rule": "delta"}),
        (128, {"head_width": 128, "memory_rule": "hebbian"}),
        (32, {"head_width": 128, "memory_rule": "delta"}),
        (4, {"embedding_dim": 48, "memory_rule": "hebbian"}),
    ],
)
def test_a_head_is_cut_into_units_of_value_channels(monkeypatch: pytest.MonkeyPatch, unit: int, changes: dict) -> None:
    monkeypatch.setattr(
        "kernels.generate.fused.choose_packets", lambda *args: dataclasses.replace(choose_packets(*args), CU=unit)
    )
    width = max(changes.get("head_width", 16), 16)
    sizes = {"embedding_dim": width, "column_width": min(width, 64), "wernicke_depth": 0, "broca_depth": 0}
    check("fused", {**sizes, **changes}, {}, 1, 2)


@pytest.mark.slow
def test_small_tiles_cut_rows_and_channels_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.generate.tiles._INTERPRETED_TILE", 16)
    for num_lanes in (1, 5):
        check("fused", {"embedding_dim": 48}, {"top_p": 0.9}, num_lanes, 2)


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=pytest.mark.slow)])
def test_stop_ids_end_lanes_one_by_one_and_hold_their_states(backend: str) -> None:
    expected = check(backend, {}, {}, 3, 8, stop=tuple(range(0, 12)))
    assert len(set(expected.lengths.tolist())) > 1, "the lanes must end at different tokens for this to show anything"
    assert int(expected.lengths.max()) < 8, "all lanes must end early"


def test_a_state_goes_there_and_back() -> None:
    model = brains.small_brain(memory_rule="delta")
    state = model.forward(torch.randint(0, model.vocab_size, (3, 5))).state
    back = unpack_state(pack_state(model, state), state)
    for name, x in state.tensors().items():
        assert torch.equal(back.tensors()[name], x), name


@pytest.mark.parametrize("rule", ["hebbian", "delta"])
@pytest.mark.parametrize("go_gate", [True, False])
def test_the_layout_is_as_long_as_it_says(rule: str, go_gate: bool) -> None:
    model = brains.small_brain(memory_rule=rule, go_gate=go_gate, embedding_dim=48)
    packed = pack_brain(model)
    assert packed.matrices.numel() == packed.shape.matrices_size
    assert packed.vectors.numel() == packed.shape.vectors_size


def test_weights_are_packed_anew_when_they_have_changed_and_go_with_their_model() -> None:
    model = brains.small_brain()
    first = packed_brain(model)
    kept = packed_brain(model)
    assert kept is not first  # one sample now and then keeps nothing
    assert packed_brain(model) is kept
    assert packed_brain(model, torch.bfloat16) is not kept
    kept = [packed_brain(model) for _ in range(3)][-1]
    with torch.no_grad():
        next(model.brain.parameters()).add_(1.0)
    changed = packed_brain(model)
    assert changed is not kept
    assert not (torch.equal(changed.matrices, kept.matrices) and torch.equal(changed.vectors, kept.vectors))
    kept = [packed_brain(model) for _ in range(2)][-1]
    assert packed_brain(model) is kept
    matrices = weakref.ref(kept.matrices)
    del model, kept, first, changed
    gc.collect()
    assert matrices() is None


def test_generating_leaves_the_given_state_alone() -> None:
    model = brains.small_brain()
    state = pack_state(model, model.init_state(1))
    before = PackedState(*(tensor.clone() for tensor in state))
    none = torch.tensor([], dtype=torch.int64)
    for backend in ("reference", "fused"):
        generate(
            pack_brain(model), state, torch.tensor([3]), Sampling(), max_new_tokens=1, seed=0, lanes=torch.tensor([0]),
            stop_ids=none, backend=backend,
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(state, before))


@pytest.mark.parametrize(
    ("changes", "lanes", "words"),
    [
        ({"column_width": 24, "width": 48}, 1, "column_width is 24"),
        ({"head_width": 8}, 1, "head_width is 8"),
        ({"mlp_width": 100}, 1, "multiples of 16"),
        ({}, 65, "65 lanes"),
        ({"spike_kind": "smooth"}, 1, "spike is 'smooth'; the launch knows graded and binary ones"),
    ],
)
def test_what_the_launch_cannot_hold_is_named(changes: dict, lanes: int, words: str) -> None:
    shape = {"width": 64, "column_width": 16, "head_width": 16, "mlp_width": 192, "vocab_size": 41}
    with pytest.raises(ValueError, match=words):
        check_shape(BrainShape(**{**shape, **changes}, num_wernicke=1, num_memory=1, num_broca=1), lanes)


def test_a_brain_that_does_not_fit_goes_token_by_token_by_name() -> None:
    model = brains.small_brain(head_width=8)
    with torch.no_grad():
        request = make_request(model, 2, 5)
        with pytest.warns(UserWarning, match="token by token instead of in one launch: generate: head_width is 8"):
            ours = launch_or_loop(model, request)
        assert_same(ours, token_loop(model, request, PolledReader(request, model.device)), tolerance=0)


@pytest.mark.parametrize(
    ("message", "falls_back"), [("too many blocks in cooperative launch", True), ("an illegal memory access", False)]
)
def test_only_a_lack_of_room_falls_back(monkeypatch: pytest.MonkeyPatch, message: str, falls_back: bool) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("neurogen.generation.launch.generate", refuse)
    model = brains.small_brain()
    with torch.no_grad():
        request = make_request(model, 1, 2)
        with pytest.warns(UserWarning, match=message) if falls_back else pytest.raises(RuntimeError, match=message):
            launch_or_loop(model, request)


def test_bytes_of_a_token_count_every_weight_and_state_once() -> None:
    model = brains.small_brain()
    shape = brain_shape(model.config, model.vocab_size)
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embedding"))
    state = model.init_state(1)
    floats = sum(x.numel() for x in state.tensors().values() if x.is_floating_point())
    padding = shape.vectors_size * 4 + shape.matrices_size * 4 + shape.vocab_size * shape.width * 4 - weights * 4
    assert 0 <= padding < 64 * 4 * 6
    assert shape.bytes_per_token(element_size=4) == weights * 4 + padding + floats * 8


@pytest.mark.gpu
@pytest.mark.parametrize("preset", [*PRESETS, *SLOW_PRESETS])
@pytest.mark.parametrize("num_lanes", [1, 2, 4, 16, 33, 64])
def test_the_launch_is_the_model_on_a_gpu(preset: str, num_lanes: int) -> None:
    changes, sampling, _ = {**PRESETS, **SLOW_PRESETS}[preset]
    model = brains.small_brain(**changes).cuda()
    with torch.no_grad():
        request = make_request(model, num_lanes, 50, (1, 2), **sampling)
        expected = token_loop(model, request, PolledReader(request, model.device))
        assert_same(generate_in_one_launch(model, request), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("without_packets")
def test_one_lane_goes_without_packets_on_a_gpu() -> None:
    model = brains.small_brain(memory_rule="delta").cuda()
    with torch.no_grad():
        request = make_request(model, 1, 50, top_p=0.9)
        expected = token_loop(model, request, PolledReader(request, model.device))
        assert_same(generate_in_one_launch(model, request), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["small", "base"])
def test_a_thousand_tokens_on_a_gpu(size: str) -> None:
    sizes = {
        "small": {"embedding_dim": 512, "column_width": 64, "head_width": 64},
        "base": {"embedding_dim": 1536, "column_width": 128, "head_width": 64},
    }[size]
    model = brains.small_brain(hippocampus_depth=2, pfc_depth=2, **sizes).cuda()
    with torch.no_grad():
        request = make_request(model, 1, 1000)
        expected = token_loop(model, request, PolledReader(request, model.device))
        ours = generate_in_one_launch(model, request)
    assert torch.equal(ours.tokens, expected.tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("num_lanes", [1, 2, 8, 32, 64])
def test_bfloat16_log_probs_at_forced_positions(num_lanes: int) -> None:
    """The launch's own tokens, read again by the float32 model as one sequence."""
    model = brains.small_brain(embedding_dim=512, column_width=64, head_width=64).cuda()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        request = make_request(model, num_lanes, 128)
        ours = generate_in_one_launch(model, request)
    with torch.no_grad():
        ids = torch.cat([request.input_ids, ours.tokens], 1)
        log_probs = model.forward(ids[:, :-1], request.state).logits.log_softmax(-1)
        forced = log_probs[:, -128:].gather(-1, ours.tokens[..., None])[..., 0]
    assert (forced - ours.log_probs).norm() / forced.norm() < 2e-2


@pytest.mark.gpu
def test_the_number_of_launches_does_not_depend_on_the_number_of_tokens() -> None:
    model = brains.small_brain(embedding_dim=128, column_width=64, head_width=64).cuda()

    def launches(num_tokens: int) -> int:
        with torch.no_grad():
            request = make_request(model, 1, num_tokens)
            for _ in range(2):  # a model's weights are packed in its first two replies, and then kept
                generate_in_one_launch(model, request)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                generate_in_one_launch(model, request)
                torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    assert launches(4) == launches(64) > 0
