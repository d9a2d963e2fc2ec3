"""Named tensors in safetensors files, written durably with their hash and read with every fault turned into one line.

The library's own writer needs the whole file in memory, reports a full disk as a text, and refuses tied tensors. The
format is small (eight bytes of header length, a JSON header, raw little-endian data), so it is written here one
tensor at a time; reading is the library's.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neurogen.errors import UserError

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class FileRecord:
    """What is written down about a file: its size, its SHA-256, and for tensors the names that share another's data."""

    num_bytes: int
    sha256: str
    tied: dict[str, str] = field(default_factory=dict)


def _identity(tensor: Tensor) -> tuple:
    """Two tensors with the same identity are the same elements of the same storage."""
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def find_tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each name whose tensor is the very same memory as an earlier one (in sorted order) to that earlier name."""
    owners: dict[tuple, str] = {}
    tied: dict[str, str] = {}
    for name in sorted(tensors):
        if tensors[name].numel():
            owner = owners.setdefault(_identity(tensors[name]), name)
            if owner != name:
                tied[name] = owner
    return tied


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the host, so that training may go on changing the originals; tied tensors stay tied."""
    tied = find_tied(tensors)
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items() if name not in tied}
    return {name: copies[tied.get(name, name)] for name in tensors}


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements in C order as bytes, on the host."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Write a safetensors file, sync it, and return its size, hash and ties. Tied tensors are stored once.

    Arguments:
        metadata: texts by name, kept in the file's header.

    Raises OSError when the disk refuses (the partial file is left for the caller to remove), TypeError for a dtype the
    format has no name for.
    """
    tied = find_tied(tensors)
    # Large elements first, as the library does: every tensor then starts at a multiple of its element size.
    names = sorted(tensors.keys() - tied.keys(), key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors files here do not hold")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    num_bytes = 0
    with open(path, "wb") as file:

        def put(chunk: bytes | memoryview) -> None:
            nonlocal num_bytes
            digest.update(chunk)
            file.write(chunk)
            num_bytes += len(chunk)

        put(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            put(raw_bytes(tensors[name]))
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(num_bytes, digest.hexdigest(), tied)


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when asked for. `tied` adds names that share another's data.
    `metadata` has the texts of the file's header.

    Every fault of the file raises UserError naming it; a missing name raises KeyError as any mapping does.
    """

    def __init__(self, path: Path, tied: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._tied = dict(tied or {})
        with self._open() as file:
            self._names = frozenset(file.keys())
            self.metadata: dict[str, str] = dict(file.metadata() or {})
        for name, owner in self._tied.items():
            if name in self._names or owner not in self._names:
                raise UserError(f"{path} does not hold {owner!r}, which {name!r} is said to share; use another copy")

    def _open(self, device: str = "cpu"):
        try:
            return safe_open(self.path, framework="pt", device=device)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(f"{self.path} is not a readable safetensors file ({reason}); use another copy")

    def _get(self, file, name: str) -> Tensor:
        try:
            # A copy: what the library returns may be a view of the mapped file.
            return file.get_tensor(name).clone()
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
            raise self._broken(error) from error

    def __getitem__(self, name: str) -> Tensor:
        owner = self._tied.get(name, name)
        if owner not in self._names:
            raise KeyError(name)
        with self._open() as file:
            return self._get(file, owner)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names | self._tied.keys()))

    def __len__(self) -> int:
        return len(self._names) + len(self._tied)

    def load(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Read everything. Names that were tied when saved come back as one tensor."""
        with self._open(str(device)) as file:
            tensors = {name: self._get(file, name) for name in sorted(self._names)}
        return {name: tensors[self._tied.get(name, name)] for name in self}
