"""State as data: saved, loaded, split, joined, reset, moved."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.cortex import CortexState
from neurogen import BrainState, NeuroGen, UserError
from neurogen.brain.state import FORMAT
from neurogen.storage.sealed_tensors import save_sealed


@pytest.fixture
def state(make_model: Callable[..., NeuroGen]) -> BrainState:
    """Three lanes that have read different things."""
    ids = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return make_model(memory_rule="delta")(ids).state


def assert_equal(got: BrainState, expected: BrainState) -> None:
    tensors = expected.tensors()
    assert got.tensors().keys() == tensors.keys()
    for name, x in got.tensors().items():
        assert x.dtype == tensors[name].dtype
        assert torch.equal(x, tensors[name]), name


def test_shapes_names_and_size(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(dtype=torch.float32, hippocampus_depth=2)
    state = model.init_state(3)
    shapes = {name: tuple(x.shape) for name, x in state.tensors().items()}
    neurons, fast = (3, 24), (3, 4, 6, 6)
    expected = {"position": (3,), "recent_ids": (3, 3)}
    for name in ("wernicke.0", "broca.0"):
        expected |= {f"{name}.{part}": neurons for part in ("voltage", "adaptation", "spikes")}
    expected |= {f"{name}.fast_weight": fast for name in ("hippocampus.0", "hippocampus.1", "pfc.0")}
    assert shapes == expected
    assert state.num_bytes == 3 * (8 + 3 * 8 + 4 * (2 * 3 * 24 + 3 * 4 * 36))
    assert list(state.layers) == ["wernicke.0", "hippocampus.0", "hippocampus.1", "pfc.0", "broca.0"]
    assert (state.recent_ids == -1).all()
    assert model.init_state(3, device="meta").position.device.type == "meta"
    with pytest.raises(UserError, match="lanes is 0"):
        model.init_state(0)


def test_save_and_load(state: BrainState, tmp_path: Path) -> None:
    state.save(tmp_path / "state.safetensors")
    assert_equal(BrainState.load(tmp_path / "state.safetensors"), state)
    # A view of some lanes is not contiguous, and is saved all the same.
    odd = state.map(lambda x: x[::2])
    odd.save(tmp_path / "odd.safetensors")
    assert_equal(BrainState.load(tmp_path / "odd.safetensors"), state.select([0, 2]))


def test_a_loaded_state_goes_on_bit_for_bit(make_model: Callable[..., NeuroGen], tmp_path: Path) -> None:
    model = make_model(dtype=torch.float32)
    ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        state = model(ids[:, :5]).state
        state.save(tmp_path / "state")
        expected = model(ids[:, 5:], state).logits
        got = model(ids[:, 5:], BrainState.load(tmp_path / "state")).logits
    assert torch.equal(got, expected)


def test_damaged_and_foreign_files_are_refused(state: BrainState, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    state.save(path)
    whole = path.read_bytes()
    for name, content in (("cut", whole[:-9]), ("short", whole[:20]), ("empty", b""), ("text", b"no state at all")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not a readable safetensors file"):
            BrainState.load(tmp_path / name)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    (tmp_path / "flipped").write_bytes(flipped)
    with pytest.raises(UserError, match="is damaged"):
        BrainState.load(tmp_path / "flipped")
    with pytest.raises(UserError, match="no brain state file"):
        BrainState.load(tmp_path / "none")
    with pytest.raises(UserError, match="no brain state file"):
        BrainState.load(tmp_path)
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="holds no brain state"):
        BrainState.load(tmp_path / "foreign")
    save_sealed(tmp_path / "posing", {"x": torch.zeros(2)}, file_format=FORMAT)
    with pytest.raises(UserError, match="has no tensor 'position'"):
        BrainState.load(tmp_path / "posing")


def test_a_save_that_fails_leaves_the_old_file(
    state: BrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    state.save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        state.reset([0]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_that_make_no_state_are_refused(state: BrainState) -> None:
    flat = state.tensors()
    with pytest.raises(UserError, match="which no kind of layer has"):
        BrainState.from_tensors({name: x for name, x in flat.items() if name != "broca.0.voltage"})
    with pytest.raises(UserError, match=r"'broca.0.voltage' .* not 3 lanes"):
        BrainState.from_tensors(flat | {"broca.0.voltage": torch.zeros(2, 24)})
    with pytest.raises(UserError, match="not 3 lanes"):
        BrainState.from_tensors(flat | {"broca.0.voltage": torch.zeros(())})


def test_split_and_cat_are_inverses(state: BrainState) -> None:
    lanes = state.split()
    assert [lane.lanes for lane in lanes] == [1, 1, 1]
    assert_equal(BrainState.cat(lanes), state)
    assert_equal(BrainState.cat([lanes[2], lanes[0]]), state.select([2, 0]))
    with pytest.raises(UserError, match="no states"):
        BrainState.cat([])


def test_cat_refuses_other_brains(state: BrainState, make_model: Callable[..., NeuroGen]) -> None:
    with pytest.raises(UserError, match="different layers"):
        BrainState.cat([state, make_model(broca_depth=2).init_state(1)])


@pytest.mark.parametrize("chosen", [[1], torch.tensor([1]), torch.tensor([False, True, False])])
def test_reset_of_some_lanes(
    chosen: list[int] | Tensor, state: BrainState, make_model: Callable[..., NeuroGen]
) -> None:
    fresh = make_model(memory_rule="delta").init_state(1)
    before = state.clone()
    reset = state.reset(chosen)
    assert_equal(reset.select([1]), fresh)
    assert_equal(reset.select([0, 2]), before.select([0, 2]))
    assert_equal(state, before)


def test_reset_of_no_lane_and_of_all(state: BrainState) -> None:
    assert_equal(state.reset([]), state)
    assert_equal(state.reset(torch.zeros(3, dtype=torch.bool)), state)
    everything = state.reset([0, 1, 2])
    assert not any(x.any() for name, x in everything.tensors().items() if name != "recent_ids")


def test_lanes_that_are_not_there_are_refused(state: BrainState) -> None:
    for action in (state.reset, state.select):
        with pytest.raises(UserError, match=r"lanes \[3\] are not all in 0..2"):
            action([3])
        with pytest.raises(UserError, match=r"lanes \[-1\]"):
            action([-1])
    with pytest.raises(UserError, match="a mask of"):
        state.reset(torch.tensor([True, False]))


def test_select_repeats_and_reorders(state: BrainState) -> None:
    twice = state.select([2, 2, 0])
    assert twice.lanes == 3
    assert torch.equal(twice.position, state.position[[2, 2, 0]])
    assert_equal(twice.select([0]), twice.select([1]))
    assert state.select([]).lanes == 0


def test_detach_clone_and_to(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(dtype=torch.float32)
    state = model(torch.zeros(1, 2, dtype=torch.int64)).state
    layer = state.layers["wernicke.0"]
    assert isinstance(layer, CortexState)
    assert layer.voltage.requires_grad
    detached = state.detach()
    assert not any(x.requires_grad for x in detached.tensors().values())
    copy = detached.clone()
    copy.layers["wernicke.0"].voltage.fill_(7.0)
    assert not (detached.layers["wernicke.0"].voltage == 7.0).all()
    wide = detached.to(dtype=torch.float64)
    assert wide.position.dtype == torch.int64
    assert wide.layers["wernicke.0"].voltage.dtype == torch.float64
    assert detached.to("meta").recent_ids.device.type == "meta"


def test_check_fits_names_what_does_not(make_model: Callable[..., NeuroGen]) -> None:
    state = make_model().init_state(2)
    state.check_fits(make_model(memory_rule="delta").init_state(2))
    with pytest.raises(UserError, match="'position' has shape"):
        state.check_fits(make_model().init_state(3))
    with pytest.raises(UserError, match="other layers"):
        state.check_fits(make_model(pfc_depth=0).init_state(2))
    with pytest.raises(UserError, match="fast_weight"):
        state.check_fits(make_model(head_width=8).init_state(2))


@pytest.mark.gpu
def test_to_the_gpu_and_back(state: BrainState) -> None:
    assert_equal(state.to("cuda").to("cpu"), state)
