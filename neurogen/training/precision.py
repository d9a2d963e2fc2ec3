"""Where a run computes and in what arithmetic."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from neurogen.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device `auto`, `cpu`, `cuda` or `cuda:N` stands for. Raises UserError for one this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name}: unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; use device=cpu or auto"
        )
    return device


@dataclass(frozen=True)
class Precision:
    """How numbers are kept and multiplied.

    bfloat16 keeps parameters, gradients and optimiser state in float32 and autocasts matrix products; float32 and
    float64 are what they say, without TF32.
    """

    device: torch.device
    name: str

    @classmethod
    def resolve(cls, device: torch.device, dtype: str) -> Precision:
        """`auto` is bfloat16 on a GPU and float32 elsewhere."""
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        return cls(device, dtype)

    @property
    def activations(self) -> torch.dtype:
        """The type of what flows between projections."""
        return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[self.name]

    def place(self, model: nn.Module) -> None:
        """Move a model to the device in the dtype its parameters are kept in."""
        model.to(self.device, torch.float64 if self.name == "float64" else torch.float32)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context a forward pass runs in."""
        if self.name == "bfloat16":
            # A cache of cast weights would be filled while a step is recorded and hold freed memory afterwards.
            recording = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=not recording)
        return contextlib.nullcontext()
