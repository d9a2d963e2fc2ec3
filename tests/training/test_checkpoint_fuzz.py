"""Damage checkpoints at random: what loads is identical, everything else is refused in one line.

NEUROGEN_FUZZ_EXAMPLES=3000 python -m pytest tests/training/test_checkpoint_fuzz.py    is the long form.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import checkpoint_faults
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neurogen.errors import UserError
from neurogen.storage.tensor_file import TensorFile
from neurogen.training import checkpoint
from neurogen.training.checkpoint import load_checkpoint, save_checkpoint
from neurogen.training.tree import flatten_tree, unflatten_tree

FILES = (
    "checkpoint.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.safetensors",
    "tokenizer/tokenizer.json",
)
NUM_EXAMPLES = int(os.environ.get("NEUROGEN_FUZZ_EXAMPLES", "100"))
FUZZ = settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def original(folder: Path) -> Path:
    weight = torch.arange(12.0).reshape(3, 4)
    tensors, scalars = flatten_tree(
        {"state": {0: {"step": torch.tensor(3.0), "exp_avg": weight}}, "lr": [0.1, (1, None)]}
    )
    return save_checkpoint(
        folder,
        step=12,
        model_tensors={"weight": weight, "tied": weight, "half": torch.ones(5, dtype=torch.bfloat16)},
        optimizer_tensors=tensors,
        optimizer_scalars=scalars,
        state_tensors={"spikes": torch.tensor([True, False])},
        metadata={"tokens": 99, "config": {"lr": 1e-3, "name": "nano"}, "loss": float("nan")},
        tokenizer=checkpoint_faults.TwoFileTokenizer(),
        score=1.5,
    )


def contents(path: Path, *, verify_hashes: bool) -> str:
    """Everything a reader can get out of a checkpoint, as one string."""
    loaded = load_checkpoint(path, verify_hashes=verify_hashes)
    optimizer = unflatten_tree(loaded.optimizer_tensors.load(), loaded.optimizer_scalars)
    model, state = loaded.model_tensors.load(), loaded.state_tensors.load()
    tokenizer = (loaded.tokenizer_dir / "tokenizer.json").read_bytes() if loaded.tokenizer_dir else None
    return repr((loaded.step, loaded.score, loaded.metadata, loaded.versions, model, optimizer, state, tokenizer))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = original(tmp_path_factory.mktemp("sound"))
    return path, contents(path, verify_hashes=True)


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """Truncate, flip bytes, overwrite a range, insert or repeat: what disks and transfers do."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, max(0, len(damaged) - 1)))
        kind = draw(st.sampled_from(["truncate", "flip", "zero", "insert", "append"]))
        if kind == "truncate":
            del damaged[position:]
        elif kind == "flip" and damaged:
            damaged[position] ^= draw(st.integers(1, 255))
        elif kind == "zero":
            length = min(draw(st.integers(1, 64)), len(damaged) - position)
            damaged[position : position + length] = bytes(length)
        elif kind == "insert":
            damaged[position:position] = draw(st.binary(min_size=1, max_size=8))
        else:
            damaged += draw(st.binary(min_size=1, max_size=8))
    return bytes(damaged)


def load_or_refuse(path: Path, *, verify_hashes: bool) -> str | None:
    try:
        return contents(path, verify_hashes=verify_hashes)
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    return None


def copy_of(sound: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(sound, folder))


@FUZZ
@given(data=st.data(), name=st.sampled_from(FILES))
def test_a_damaged_file_loads_identically_or_is_refused(
    data: st.DataObject, name: str, sound: tuple[Path, str], tmp_path: Path
) -> None:
    path = copy_of(sound[0], tmp_path / "copy")
    (path / name).write_bytes(data.draw(damage((path / name).read_bytes())))
    assert load_or_refuse(path, verify_hashes=True) in (None, sound[1])


@FUZZ
@given(data=st.data(), name=st.sampled_from(FILES[:4]))
def test_a_damaged_file_does_no_harm_without_hashes(
    data: st.DataObject, name: str, sound: tuple[Path, str], tmp_path: Path
) -> None:
    path = copy_of(sound[0], tmp_path / "copy")
    (path / name).write_bytes(data.draw(damage((path / name).read_bytes())))
    load_or_refuse(path, verify_hashes=False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places(tree: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all nodes below a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@FUZZ
@given(data=st.data())
def test_sealed_metadata_with_anything_in_it_does_no_harm(
    data: st.DataObject, sound: tuple[Path, str], tmp_path: Path
) -> None:
    """An attacker can compute the hash of the metadata: any value anywhere must load or be refused, never crash."""
    path = copy_of(sound[0], tmp_path / "copy")
    document = json.loads((path / "checkpoint.json").read_bytes())["checkpoint"]
    place = data.draw(st.sampled_from(list(places(document))))
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = data.draw(JSON)
    (path / "checkpoint.json").write_bytes(checkpoint._seal(document))
    load_or_refuse(path, verify_hashes=data.draw(st.booleans()))


@FUZZ
@given(data=st.data())
def test_a_forged_tensor_header_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    """Wrong types, shapes, overlapping or huge offsets: the reader answers, and never reads out of bounds."""
    numbers = st.integers(-2, 40) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F4", "C64", "I64", "F8_E4M3", "nonsense"]),
            "shape": st.lists(numbers, max_size=3),
            "data_offsets": st.lists(numbers, min_size=2, max_size=2),
        }
    )
    header = json.dumps(data.draw(st.dictionaries(st.text(max_size=4), entry | JSON, max_size=3))).encode()
    path = tmp_path / "forged.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data.draw(st.integers(0, 40))))
    try:
        tensors, refusal = TensorFile(path).load(), ""
    except UserError as error:
        tensors, refusal = {}, str(error)
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 40
    assert "\n" not in refusal
