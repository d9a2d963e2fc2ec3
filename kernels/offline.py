"""Compile a kernel for a GPU that is not there and read what the compiler made of it."""

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SHARED_LIMITS = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes a block, by compute capability


class Resources(NamedTuple):
    """Registers a thread, bytes of stack (spills, arrays in local memory) a thread, bytes of shared memory a block."""

    registers: int
    stack_bytes: int
    shared_bytes: int


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    capability: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Collection[str] = (),
    max_registers: int | None = None,
    disassemble: bool = True,
) -> tuple[Resources, str]:
    """Compile a `@triton.jit` function without a GPU.

    Arguments:
        kernel: defined with the interpreter off (TRITON_INTERPRET=0).
        signature: type of every argument by name, such as `*bf16`, `i32` or `constexpr`.
        constexprs: the values of those.
        capability: 80, 89 or 90.
        divisible: integer arguments known to be multiples of 16; pointers always are.
        max_registers: a thread; None lets the compiler choose.
        disassemble: False saves half a second and gives "" for the machine code.

    Returns:
        What it uses, and its machine code as text.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Torch's tensors begin at multiples of 16 bytes at least, and a launch tells the compiler so.
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in divisible]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=dict(signature), constexprs=dict(constexprs), attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "-res-usage", cubin)
        machine_code = _output(tools / "nvdisasm", cubin) if disassemble else ""
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    return Resources(int(match[1]), int(match[2]), compiled.metadata.shared), machine_code


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
