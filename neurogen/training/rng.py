"""The states of the global random number generators as JSON, so that a resumed run draws what it would have drawn."""

import base64
import random
from typing import Any

import numpy as np
import torch

from neurogen.errors import UserError


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(_decode(text)), dtype=torch.uint8)


def capture_rng() -> dict[str, Any]:
    """Return the states of `random`, numpy's and torch's global generators and the current CUDA device (or None)."""
    version, words, next_gauss = random.getstate()
    name, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_available() else None
    return {
        "python": [version, list(words), next_gauss],
        "numpy": [name, _encode(np.asarray(keys).astype("<u4").tobytes()), position, has_gauss, cached_gauss],
        "torch": _encode(torch.get_rng_state().numpy().tobytes()),
        "cuda": None if cuda is None else _encode(cuda),
    }


def restore_rng(states: dict[str, Any]) -> list[str]:
    """Undo `capture_rng`; return ["cuda"] if that generator is left alone because one side has no CUDA device, else [].

    Raises UserError when the states are malformed.
    """
    try:
        version, words, next_gauss = states["python"]
        name, keys, position, has_gauss, cached_gauss = states["numpy"]
        torch_state = _tensor(states["torch"])
        cuda_state = None if states["cuda"] is None else _tensor(states["cuda"])
        random.setstate((version, tuple(words), next_gauss))
        np.random.set_state((name, np.frombuffer(_decode(keys), dtype="<u4"), position, has_gauss, cached_gauss))
        torch.set_rng_state(torch_state)
        if cuda_state is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_state)
            return []
        return ["cuda"] if cuda_state is not None or torch.cuda.is_available() else []
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"the checkpoint's random number states cannot be restored: {error}") from error
