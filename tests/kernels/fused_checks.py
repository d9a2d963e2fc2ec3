"""What tests of fused kernels share: the measure of error, poisoned memory, and what the compiler makes of a kernel."""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from compiler import call_in_compiler
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
    """Registers and stack bytes a thread, shared bytes a block, and the machine code if it was asked for."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    machine_code: str


def check_compiled(
    cases: list[CompileCase], capabilities: tuple[int, ...] = (89, 90), *, read_code: bool = False
) -> list[Compiled]:
    """Compile each case for every capability, case by case; assert that nothing spills and blocks fit into shared
    memory. To read the machine code takes half a second a kernel."""
    targets = [(case, capability) for case in cases for capability in capabilities]
    arguments = [(case._asdict(), capability) for case, capability in targets]
    results = [Compiled(*entry) for entry in call_in_compiler("fused_checks", "compile_cases", arguments, read_code)]
    for (case, capability), compiled in zip(targets, results, strict=True):
        assert compiled.stack_bytes == 0, (case.kernel, capability)
        assert compiled.shared_bytes <= SHARED_LIMITS[capability], (case.kernel, capability)
    return results


def compile_cases(targets: list[tuple[dict[str, Any], int]], read_code: bool) -> list[Compiled]:
    """What check_compiled asks of the process that compiles."""
    import triton.language as tl

    from kernels.offline import compile_kernel

    results = []
    for entry, capability in targets:
        case = CompileCase(**entry)
        kernel = getattr(importlib.import_module(case.module), case.kernel)
        signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
        constants = {
            name: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
            for name, value in case.constexprs.items()
        }
        resources, machine_code = compile_kernel(
            kernel,
            signature,
            constants,
            capability=capability,
            num_warps=case.num_warps,
            num_stages=case.num_stages,
            disassemble=read_code,
        )
        results.append(Compiled(*resources, machine_code))
    return results
