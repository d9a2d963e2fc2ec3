"""From a mode to one that runs here: what the fused kernels take, and whether they compute rightly on this GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from kernels.launch import INTERPRETED
from neurogen.brain import BrainConfig
from neurogen.errors import UserError
from neurogen.modes.canary import CanaryError, check_kernels
from neurogen.modes.registry import resolve_mode

FUSED_WIDTHS = (16, 32, 64, 128)
ON_CANARY_FAILURE = ("stop", "fall_back")


def select_mode(
    name: str,
    config: BrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cache_dir: Path | None = None,
    on_canary_failure: str = "stop",
) -> str:
    """The mode to run, checked.

    Arguments:
        name: a mode's name, or `auto`: fused on a CUDA GPU for what its kernels take, otherwise unfused.
        config: the brain.
        device, dtype: where activations live, and their type.
        cache_dir: where passed canaries are remembered.
        on_canary_failure: `stop` raises, `fall_back` warns on standard error and runs unfused.

    Raises:
        UserError: there is no such mode, or the fused kernels do not take this brain, device or type.
        CanaryError: a fused kernel is wrong on this device.
    """
    if on_canary_failure not in ON_CANARY_FAILURE:
        choices = ", ".join(ON_CANARY_FAILURE)
        raise UserError(f"mode.on_canary_failure is {on_canary_failure!r}; choose one of {choices}")
    obstacle = fused_obstacle(config, device, dtype)
    if name == "auto":
        name = "fused" if device.type == "cuda" and obstacle is None else "unfused"
    name = resolve_mode(name)
    if name != "fused":
        return name
    if obstacle is not None:
        raise UserError(f"mode=fused: {obstacle}; or use mode=unfused")
    if device.type != "cuda":
        print("mode=fused: no GPU here, so its kernels run in Triton's interpreter, slowly", file=sys.stderr)
        return name
    try:
        check_kernels(config, device, dtype, cache_dir=cache_dir)
    except CanaryError as error:
        if on_canary_failure == "stop":
            raise
        print(f"warning: {error}; falling back to mode=unfused, as mode.on_canary_failure says", file=sys.stderr)
        return "unfused"
    return name


def fused_obstacle(config: BrainConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the fused kernels cannot run this, and what to change; None if they can."""
    for key in ("column_width", "head_width"):
        if getattr(config, key) not in FUSED_WIDTHS:
            return f"its kernels take model.{key} of {', '.join(map(str, FUSED_WIDTHS))}, not {getattr(config, key)}"
    if dtype == torch.float64:
        return "its kernels accumulate in float32, not float64; set dtype to float32 or bfloat16"
    if device.type != "cuda":
        if not INTERPRETED:
            return f"the device is {device} on a machine with a GPU; use the GPU, or set TRITON_INTERPRET=1"
        if dtype != torch.float32:
            return "Triton's interpreter computes in float32 alone; set dtype to float32"
    return None
