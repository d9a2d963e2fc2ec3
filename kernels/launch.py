"""How Triton kernels run here: compiled on a CUDA GPU, or in Triton's interpreter where there is none.

Import this before `triton`: the interpreter is chosen when a kernel is defined, by an environment variable.
"""

import os
from typing import Any

import torch
from torch import Tensor

if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check_launchable(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device that this process's Triton kernels can run on."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: tensors are on {', '.join(sorted(map(str, devices)))}; move them to one device")
    (device,) = devices
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"{op}: fused kernels need a CUDA tensor and got one on {device}; use the reference backend")
    half = [tensor.dtype for tensor in tensors if tensor is not None and tensor.dtype == torch.bfloat16]
    if INTERPRETED and half:
        raise ValueError(f"{op}: Triton's interpreter computes bfloat16 wrongly; use float32 without a GPU")
    double = [tensor.dtype for tensor in tensors if tensor is not None and tensor.dtype == torch.float64]
    if double:
        raise ValueError(f"{op}: fused kernels accumulate in float32; use the reference backend for float64")


def reserve_shared(compiled: Any, num_bytes: int) -> int:
    """Have a compiled kernel launched with at least `num_bytes` of shared memory behind the compiler's own, which its
    code reaches by itself, and return where they begin, a multiple of 128. `compiled` is what `kernel.warmup` returns,
    and what a launch with the same arguments runs; the first reservation stays, as a kernel is loaded with it.
    """
    from triton.compiler.compiler import make_backend

    if not hasattr(compiled, "own_shared"):
        compiled.own_shared = compiled.metadata.shared
        start = -(-compiled.own_shared // 128) * 128
        compiled.metadata = compiled.metadata._replace(shared=start + num_bytes)
        compiled.packed_metadata = make_backend(compiled.metadata.target).pack_metadata(compiled.metadata)
    start = -(-compiled.own_shared // 128) * 128
    assert start + num_bytes <= compiled.metadata.shared
    return start
