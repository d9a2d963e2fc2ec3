"""One safetensors file that vouches for itself: it names its format and holds the hash of its tensors."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from neurogen.errors import UserError
from neurogen.storage.files import canonical_json, replacing
from neurogen.storage.tensor_file import TensorFile, find_tied, raw_bytes, write_tensors


def save_sealed(path: Path, tensors: Mapping[str, Tensor], *, file_format: str) -> None:
    """Write tensors whole or not at all, synced. Tensors that share memory come back as copies.

    Arguments:
        file_format: a name such as `neurogen-state-2`, which `load_sealed` asks for.

    Raises OSError when the file system refuses; what `path` held before is then still there.
    """
    separate = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    separate |= {name: separate[name].clone() for name in find_tied(separate)}
    with replacing(path) as temporary:
        write_tensors(temporary, separate, {"format": file_format, "sha256": _digest(separate)})


def load_sealed(path: Path, *, file_format: str, noun: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read what `save_sealed` wrote.

    Arguments:
        noun: what such a file holds, for the messages.

    Raises UserError, one line, if there is no such file, it is damaged, or it is of another format.
    """
    if not path.is_file():
        raise UserError(f"no {noun} file at {path}")
    file = TensorFile(path)
    if file.metadata.get("format") != file_format:
        raise UserError(f"{path} holds no {noun} (its format is not {file_format})")
    tensors = file.load()
    if _digest(tensors) != file.metadata.get("sha256"):
        raise UserError(f"{path} is damaged (its tensors are not the ones that were saved); use another copy")
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and elements, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
