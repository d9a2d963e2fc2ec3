import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from neurogen.errors import UserError
from neurogen.storage.tensor_file import TensorFile, find_tied, snapshot, write_tensors

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    assert torch.equal(*as_bytes)


def example() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5) * 3).to(dtype) for dtype in DTYPES}
    tensors["not contiguous"] = torch.randn(4, 6).t()[1:]
    tensors["scalar"] = torch.tensor(7.5)
    tensors["empty"] = torch.empty(0, 3)
    tensors["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    tensors["odd bytes"] = torch.arange(3, dtype=torch.int8)
    tensors['name "with" ünïcode/ and spaces'] = torch.ones(2)
    tensors["parameter"] = torch.nn.Parameter(torch.randn(2, 2))
    return tensors


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    record = write_tensors(path, example())
    theirs = safetensors.torch.load_file(path)
    assert theirs.keys() == example().keys()
    for name, tensor in example().items():
        assert_same_bits(theirs[name], tensor.detach())
    assert record.num_bytes == path.stat().st_size
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {name: tensor.detach().contiguous() for name, tensor in example().items()}
    safetensors.torch.save_file(tensors, path)
    ours = TensorFile(path)
    assert set(ours) == set(tensors)
    assert len(ours) == len(tensors)
    for name, tensor in ours.load().items():
        assert_same_bits(tensor, tensors[name])
        assert_same_bits(ours[name], tensors[name])


def test_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {})
    assert TensorFile(path).load() == {}
    assert safetensors.torch.load_file(path) == {}


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    weight = torch.randn(100, 10)
    tensors = {"embedding": weight, "decoder": weight.detach(), "row": weight[:1], "copy": weight.clone()}
    path = tmp_path / "a.safetensors"
    record = write_tensors(path, tensors)
    assert record.tied == {"embedding": "decoder"}
    assert path.stat().st_size < 2 * weight.nbytes + weight[:1].nbytes + 1000
    loaded = TensorFile(path, record.tied)
    assert set(loaded) == set(tensors)
    assert len(loaded) == 4
    assert_same_bits(loaded["embedding"], weight)
    tensors = loaded.load()
    assert tensors["embedding"] is tensors["decoder"]
    assert tensors["copy"].data_ptr() != tensors["decoder"].data_ptr()
    assert_same_bits(tensors["row"], weight[:1])


def test_equal_memory_of_another_shape_is_not_tied() -> None:
    weight = torch.randn(4, 4)
    assert (
        find_tied({"a": weight, "b": weight.t(), "c": weight.view(-1), "d": torch.empty(0), "e": torch.empty(0)}) == {}
    )


def test_snapshot_is_a_copy_that_keeps_ties() -> None:
    weight = torch.zeros(3)
    copies = snapshot({"a": weight, "b": weight, "c": torch.ones(1)})
    weight += 1
    assert torch.equal(copies["a"], torch.zeros(3))
    assert copies["a"] is copies["b"]


def test_reading_gives_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(4)})
    before = path.read_bytes()
    tensor = TensorFile(path).load()["a"]
    path.unlink()
    tensor += 1
    assert torch.equal(tensor, torch.ones(4))
    path.write_bytes(before)
    assert torch.equal(TensorFile(path)["a"], torch.zeros(4))


def test_unknown_names_are_key_errors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"a": torch.zeros(4)})
    with pytest.raises(KeyError):
        TensorFile(tmp_path / "a")["b"]


def test_ties_to_nothing_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"a": torch.zeros(4)})
    for tied in ({"b": "c"}, {"a": "a"}):
        with pytest.raises(UserError, match="said to share"):
            TensorFile(tmp_path / "a", tied)


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="complex64"):
        write_tensors(tmp_path / "a", {"a": torch.zeros(4, dtype=torch.complex64)})


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"\xff" * 8, b"\x02" + b"\x00" * 7 + b"{]", b"not a tensor file" * 9]
)
def test_garbage_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors is not a readable safetensors file") as caught:
        TensorFile(path).load()
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone"):
        TensorFile(tmp_path / "gone")
