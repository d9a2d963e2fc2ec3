import json
import math
import shutil
from pathlib import Path

import checkpoint_faults
import pytest
import safetensors.torch
import torch

from neurogen.errors import UserError
from neurogen.training import checkpoint
from neurogen.training.checkpoint import find_latest, list_checkpoints, load_checkpoint, save_checkpoint
from neurogen.training.tree import flatten_tree, unflatten_tree


def save(folder: Path, step: int, **overrides) -> Path:
    arguments = {"model_tensors": {"weight": torch.full((3,), float(step))}} | overrides
    return save_checkpoint(folder, step=step, **arguments)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def reseal(folder: Path, **changes) -> None:
    """Change the metadata as somebody who knows the format can: with a hash that matches."""
    document = json.loads((folder / "checkpoint.json").read_bytes())["checkpoint"]
    (folder / "checkpoint.json").write_bytes(checkpoint._seal({**document, **changes}))


def test_everything_comes_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    tensors, scalars = flatten_tree(optimizer.state_dict())
    metadata = {"tokens": 5, "best": math.inf, "worst": math.nan, "config": {"a": [1, 2.5, None, "x"]}, "big": 2**80}
    path = save(
        tmp_path,
        7,
        model_tensors=model.state_dict(),
        optimizer_tensors=tensors,
        optimizer_scalars=scalars,
        state_tensors={"memory": torch.randn(2, 3)},
        metadata=metadata,
        tokenizer=checkpoint_faults.TwoFileTokenizer(),
        score=1.25,
    )
    assert path == tmp_path / "step-00000007"
    assert names(path) == [
        "checkpoint.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.safetensors",
        "tokenizer",
    ]
    loaded = load_checkpoint(path)
    assert (loaded.path, loaded.step, loaded.score) == (path, 7, 1.25)
    assert math.isnan(loaded.metadata.pop("worst"))
    metadata.pop("worst")
    assert loaded.metadata == metadata
    assert loaded.versions["torch"] == torch.__version__
    assert all(torch.equal(loaded.model_tensors[name], value) for name, value in model.state_dict().items())
    restored = unflatten_tree(loaded.optimizer_tensors.load(), loaded.optimizer_scalars)
    assert restored["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(restored["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert json.loads((loaded.tokenizer_dir / "tokenizer.json").read_text()) == {"kind": "bytes"}


def test_the_parts_that_are_optional(tmp_path: Path) -> None:
    loaded = load_checkpoint(save(tmp_path, 0))
    assert (loaded.step, loaded.metadata, loaded.score, loaded.optimizer_scalars) == (0, {}, None, None)
    assert loaded.tokenizer_dir is None
    assert loaded.optimizer_tensors.load() == loaded.state_tensors.load() == {}


def test_other_programs_read_the_tensors(tmp_path: Path) -> None:
    theirs = safetensors.torch.load_file(save(tmp_path, 3) / "model.safetensors")
    assert torch.equal(theirs["weight"], torch.full((3,), 3.0))


def test_a_model_with_tied_weights(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    loaded = load_checkpoint(save(tmp_path, 1, model_tensors=model.state_dict()))
    other = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False))
    other.load_state_dict(loaded.model_tensors.load())
    assert torch.equal(other[1].weight, model[0].weight)
    assert (loaded.path / "model.safetensors").stat().st_size < 2 * 5 * 4 * 4


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "scores", "kept"),
    [
        (2, False, [1, 2, 3, 4, 5], [4, 5]),
        (2, True, [3, 1, 2, 4, 5], [2, 4, 5]),
        (1, True, [5, 4, 3, 2, 1], [5]),
        (1, True, [math.nan, None, 2, math.inf, 3], [3, 5]),
        (1, True, [None] * 5, [5]),
        (1, True, [1, 1, 1, 1, 1], [1, 5]),
        (None, True, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        (9, False, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
    ],
)
def test_retention(tmp_path: Path, keep_last, keep_best, scores, kept) -> None:
    for step, score in enumerate(scores, start=1):
        save(tmp_path, step, score=score, keep_last=keep_last, keep_best=keep_best)
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]


def test_the_newest_save_stays_even_when_its_step_is_older(tmp_path: Path) -> None:
    for step in (10, 11, 5):
        save(tmp_path, step, keep_last=1, keep_best=False)
    assert "step-00000005" in names(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, metadata={"try": 1})
    save(tmp_path, 1, metadata={"try": 2})
    assert names(tmp_path) == ["step-00000001"]
    assert load_checkpoint(tmp_path).metadata == {"try": 2}


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 3):
        save(tmp_path, step, keep_last=None)
    assert [load_checkpoint(path).step for path in list_checkpoints(tmp_path)] == [3, 99_999_999, 100_000_000]
    assert find_latest(tmp_path).name == "step-100000000"


def test_incomplete_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep_last=None, tokenizer=checkpoint_faults.TwoFileTokenizer())
    (tmp_path / "step-00000006" / "checkpoint.json").unlink()
    with open(tmp_path / "step-00000005" / "model.safetensors", "r+b") as file:
        file.truncate(20)
    (tmp_path / "step-00000004" / "state.safetensors").unlink()
    (tmp_path / "step-00000003" / "tokenizer" / "more" / "merges.txt").write_text("")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009")
    (tmp_path / "step-00000010").write_text("a file")
    (tmp_path / "notes").mkdir()
    assert find_latest(tmp_path) == tmp_path / "step-00000002"
    assert load_checkpoint(tmp_path).step == 2


def test_a_run_directory_a_checkpoints_folder_and_a_checkpoint_all_load(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 4)
    for given in (tmp_path, tmp_path / "checkpoints", path, str(path)):
        assert load_checkpoint(given).step == 4


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "empty").mkdir()
    for given, problem in {
        "gone": "does not exist",
        "file": "is a file",
        "empty": "no complete",
        ".": "cannot read",
        "step-00000001": "cannot read",
    }.items():
        with pytest.raises(UserError, match=problem) as caught:
            load_checkpoint(tmp_path / given)
        assert "\n" not in str(caught.value)
    assert find_latest(tmp_path / "gone") is None


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/hostname",
        "tokenizer/../../outside",
        "a//b",
        "./a",
        "",
        ".",
        "..",
        "a\\..\\b",
        "a\x00b",
        "a\nb",
    ],
)
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "checkpoints", 1)
    (tmp_path / "checkpoints" / "outside").write_text("secret")
    document = json.loads((path / "checkpoint.json").read_bytes())["checkpoint"]
    record = {"num_bytes": 6, "sha256": "0", "tied": {}}
    reseal(path, files={**document["files"], name: record})
    with pytest.raises(UserError, match="names a file outside the checkpoint") as caught:
        load_checkpoint(path, verify_hashes=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["model.safetensors", "tokenizer"])
def test_links_are_refused(tmp_path: Path, target: str) -> None:
    path = save(tmp_path, 1, tokenizer=checkpoint_faults.TwoFileTokenizer())
    (path / target).rename(tmp_path / "elsewhere")
    (path / target).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": "other"}, "not checkpoint metadata"),
        ({"format_version": 2}, "format version 2"),
        ({"step": -1}, "valid step"),
        ({"step": True}, "valid step"),
        ({"step": "1"}, "valid step"),
        ({"score": "low"}, "valid score"),
        ({"metadata": []}, "no metadata"),
        ({"versions": None}, "no versions"),
        ({"files": {}}, "list its tensor files"),
        ({"files": None}, "list its tensor files"),
        ({"files": dict.fromkeys(checkpoint._TENSOR_FILES)}, "valid record"),
    ],
)
def test_metadata_that_is_not_ours_is_refused(tmp_path: Path, changes: dict, problem: str) -> None:
    path = save(tmp_path, 1)
    reseal(path, **changes)
    with pytest.raises(UserError, match=problem):
        load_checkpoint(path)
    assert find_latest(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"{" * 200_000,
        b"[" * 200_000,
        b'{"checkpoint": NaN}',
        b'{"checkpoint": {}, "checkpoint": {}}',
        b"\xff\xfe{}",
        b'{"checkpoint": ' + b"9" * 5000 + b"}",
        b'{"checkpoint": {"a": 1}, "sha256": "b"}',
        b'{"checkpoint": {"format": "neurogen-checkpoint", "format_version": 1, "\\ud800": 1e999}, "sha256": ""}',
    ],
)
def test_metadata_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 1)
    (path / "checkpoint.json").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint\.json") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_oversized_metadata_is_refused_unread(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with open(path / "checkpoint.json", "r+b") as file:
        file.truncate(2**30)  # sparse: takes no disk
    with pytest.raises(UserError, match="the limit is"):
        load_checkpoint(path)


def test_a_flipped_weight_is_seen_by_its_hash_only(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert load_checkpoint(path, verify_hashes=False).step == 1
    with pytest.raises(UserError, match=r"model\.safetensors is not what was written"):
        load_checkpoint(path)


def test_arguments_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    for bad in ({"step": -1}, {"keep_last": 0}):
        with pytest.raises(ValueError, match="at least"):
            save(tmp_path, **({"step": 1} | bad))
    with pytest.raises(TypeError):
        save(tmp_path, 1, metadata={"a": object()})
    with pytest.raises(TypeError, match="keys are strings"):
        save(tmp_path, 1, metadata={1: 2})
    assert names(tmp_path) == []


def test_an_unwritable_folder_is_the_named_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(checkpoint.CheckpointNotSaved, match="step 1 not saved"):
        save(tmp_path / "checkpoints", 1)


@pytest.mark.parametrize(
    ("written", "altered"), [(b'"tokens": 99', b'"tokens": 98'), (b"0.001", b"0.003"), (b"nano", b"nanp")]
)
def test_an_altered_value_in_the_metadata_is_seen(tmp_path: Path, written: bytes, altered: bytes) -> None:
    path = save(tmp_path, 1, metadata={"tokens": 99, "lr": 0.001, "name": "nano"})
    content = (path / "checkpoint.json").read_bytes()
    assert written in content
    (path / "checkpoint.json").write_bytes(content.replace(written, altered))
    with pytest.raises(UserError, match="does not match its own hash"):
        load_checkpoint(path)
    assert find_latest(tmp_path) is None
