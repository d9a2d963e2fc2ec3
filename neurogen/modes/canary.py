"""The canary: before a fused run, each kernel goes once forward and backward against its definition, on this device.

A Triton release or a GPU for which a kernel is compiled wrongly gives wrong numbers and no error; this is what would.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from torch import Tensor

import kernels
from neurogen.brain import BrainConfig
from neurogen.errors import UserError
from neurogen.modes.canary_probes import Probe, make_probes

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2)}  # outputs, gradients


class CanaryError(UserError):
    """A fused kernel disagrees with its definition on this device; names the op, the quantity and the error."""


def check_kernels(
    config: BrainConfig, device: torch.device | str, dtype: torch.dtype, *, cache_dir: Path | None = None
) -> bool:
    """Check every fused kernel, for this brain's widths and rules, against float64 references.

    Arguments:
        config: sizes and rules decide which kernels are compiled.
        device: where they will run.
        dtype: of activations, float32 or bfloat16.
        cache_dir: where a passed check is remembered, by device, versions, type, sizes and the kernels' source; None to
            check always.

    Returns:
        Whether a check ran (False: one with the same key had passed before).

    Raises:
        CanaryError: an output or a gradient is further from the reference than TOLERANCES allow.
    """
    device = torch.device(device)
    marker = None if cache_dir is None else cache_dir / "canary" / f"{_key(config, device, dtype)}.json"
    if marker is not None and marker.is_file():
        return False
    errors = {probe.op: compare(probe, device, dtype) for probe in make_probes(config)}
    if marker is not None:
        marker.parent.mkdir(parents=True, exist_ok=True)
        temporary = marker.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(errors, indent=1))
        temporary.replace(marker)
    return True


def compare(probe: Probe, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """norm(fused - reference) / norm(reference) of each output and gradient; raises CanaryError over the tolerance."""
    fused, reference = (_run(probe, device, dtype, backend) for backend in ("fused", "reference"))
    errors = {}
    for tolerance, got, expected in zip(TOLERANCES[dtype], fused, reference):
        for name, value in expected.items():
            error = float((got[name].double() - value).norm() / value.norm().clamp_min(1e-30))
            errors[name] = error
            if not error <= tolerance:  # also when it is not a number
                raise CanaryError(
                    f"fused {probe.op} is wrong on this device: relative error of its {name} is {error:.1e}, the limit "
                    f"in {str(dtype).removeprefix('torch.')} is {tolerance:.0e}; use mode=unfused or another "
                    "Triton release"
                )
    return errors


def _run(
    probe: Probe, device: torch.device, dtype: torch.dtype, backend: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs by name, and the gradients of a fixed random combination of them."""
    # The reference sees the same rounded numbers, in float64.
    inputs = {name: value.to(dtype) for name, value in probe.stored.items()} | probe.full
    if backend == "reference":
        inputs = {name: value.double() for name, value in inputs.items()}
    inputs = {name: value.detach().to(device).requires_grad_() for name, value in inputs.items()}
    outputs = probe.run(inputs, backend)
    generator = torch.Generator().manual_seed(21)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for value in outputs.values():
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(device)
        total = total + (value.double() * weight).sum()
    gradients = torch.autograd.grad(total, list(inputs.values()))
    named = {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients)}
    return {name: value.detach() for name, value in outputs.items()}, named


def _key(config: BrainConfig, device: torch.device, dtype: torch.dtype) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    source = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    facts = [name, torch.__version__, triton.__version__, str(dtype), asdict(config), source.hexdigest()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
