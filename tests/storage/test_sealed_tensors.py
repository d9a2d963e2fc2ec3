from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neurogen.errors import UserError
from neurogen.storage.sealed_tensors import load_sealed, save_sealed
from neurogen.storage.tensor_file import write_tensors


def load(path: Path) -> dict[str, torch.Tensor]:
    return load_sealed(path, file_format="sealed-1", noun="thing")


def test_what_was_saved_comes_back_and_the_library_reads_it_too(tmp_path: Path) -> None:
    path = tmp_path / "a"
    shared = torch.randn(5)
    tensors = {"scalar": torch.tensor(2), "view": torch.randn(3, 4).t(), "one": shared, "other": shared}
    tensors |= {"half": torch.randn(3).bfloat16(), "empty": torch.empty(0, 2)}
    save_sealed(path, tensors, file_format="sealed-1")
    for read in (load(path), load_file(path)):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


def test_a_flipped_bit_is_seen_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_sealed(path, {"x": torch.arange(4), "y": torch.zeros(3)}, file_format="sealed-1")
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        if position >= len(whole) - 4 * 8 - 3 * 4:
            with pytest.raises(UserError, match="is damaged"):
                load(path)
            continue
        try:
            read = load(path)
        except UserError:
            continue
        # A space of the header's padding, say: nothing was lost.
        assert torch.equal(read["x"], torch.arange(4))
        assert torch.equal(read["y"], torch.zeros(3))


def test_another_format_is_refused(tmp_path: Path) -> None:
    save_sealed(tmp_path / "a", {}, file_format="sealed-2")
    write_tensors(tmp_path / "b", {"x": torch.zeros(1)})
    for name in "ab":
        with pytest.raises(UserError, match=f"{name} holds no thing"):
            load(tmp_path / name)
