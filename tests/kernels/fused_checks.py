"""What tests of fused kernels share: the measure of error, poisoned memory, and compilation in a process of its own.

As a script it reads a JSON list of CompileCase from its input and writes what the compiler made of each.
"""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.offline import SHARED_LIMITS


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """norm(actual - expected) / norm(expected) in float64; the plain norm of actual where expected is zero."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / (expected.norm() if expected.norm() > 0 else 1.0))


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and torch.empty_like return with NaN, so that an element never written is seen."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            return (
                out.fill_(float("nan"))
                if out.is_floating_point()
                else out.fill_(-(2**15) if out.dtype != torch.bool else 1)
            )

        return allocate_and_fill

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def amid_nan(x: Tensor) -> Tensor:
    """A copy that begins on 16 bytes and has NaN before and right after it, in the same block of memory."""
    block = torch.full((64 + x.numel() + 64,), math.nan, dtype=x.dtype, device=x.device)
    inside = block[64 : 64 + x.numel()].view(x.shape)
    inside.copy_(x)
    assert inside.data_ptr() % 16 == 0
    return inside


def is_amid_nan(inside: Tensor) -> bool:
    """Whether nothing was written around a tensor that `amid_nan` made."""
    block = inside._base
    return bool(block[:64].isnan().all() and block[64 + inside.numel() :].isnan().all())


class CompileCase(NamedTuple):
    """One kernel to compile: `module.kernel`, types of its run-time arguments, its constants (`"tl.bfloat16"` for a
    type), and the launch."""

    module: str
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3


class Compiled(NamedTuple):
    """Registers and stack bytes a thread, shared bytes a block, and the machine code."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    machine_code: str


def check_compiled(cases: list[CompileCase], capabilities: tuple[int, ...] = (89, 90)) -> list[Compiled]:
    """Compile each case for every capability, case by case, in one new process, whose kernels are
    defined with the interpreter off; assert that nothing spills and blocks fit into shared memory."""
    run = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([case._asdict() | {"capabilities": capabilities} for case in cases]),
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = [Compiled(**entry) for entry in json.loads(run.stdout)]
    targets = [(case, capability) for case in cases for capability in capabilities]
    for (case, capability), compiled in zip(targets, results, strict=True):
        assert compiled.stack_bytes == 0, (case.kernel, capability)
        assert compiled.shared_bytes <= SHARED_LIMITS[capability], (case.kernel, capability)
    return results


def _main() -> None:
    import triton.language as tl

    from kernels.offline import compile_kernel

    results = []
    for entry in json.load(sys.stdin):
        capabilities = entry.pop("capabilities")
        case = CompileCase(**entry)
        kernel = getattr(importlib.import_module(case.module), case.kernel)
        signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
        constants = {
            name: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
            for name, value in case.constexprs.items()
        }
        for capability in capabilities:
            resources, machine_code = compile_kernel(
                kernel,
                signature,
                constants,
                capability=capability,
                num_warps=case.num_warps,
                num_stages=case.num_stages,
            )
            results.append(Compiled(*resources, machine_code)._asdict())
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    _main()
