"""Shared memory behind the compiler's own."""

import pytest
import triton
import triton.language as tl
from compiler import call_in_compiler

import kernels.launch


@triton.jit
def sum_kernel(p_x, p_sum, N: tl.constexpr):
    tl.store(p_sum, tl.sum(tl.load(p_x + tl.arange(0, N)), 0))


def reserved(*sizes: int) -> tuple[int, list[int], int]:
    """The compiler's own bytes, where each reservation begins, and what the kernel is launched with."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"p_x": "*fp32", "p_sum": "*fp32", "N": "constexpr"}
    source = ASTSource(fn=sum_kernel, signature=signature, constexprs={"N": 1024}, attrs={})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    own = compiled.metadata.shared
    starts = [kernels.launch.reserve_shared(compiled, size) for size in sizes]
    _, _, launched_with = compiled.packed_metadata
    assert compiled.metadata.shared == launched_with
    return own, starts, launched_with


def test_what_is_reserved_lies_behind_the_compilers_own_and_stays() -> None:
    own, starts, launched_with = call_in_compiler("test_reserve_shared", "reserved", 5000, 5000, 100)
    assert own > 0, "a sum over warps takes some"
    assert starts == [-(-own // 128) * 128] * 3
    assert launched_with == starts[0] + 5000


def test_a_kernel_is_not_given_more_than_it_was_loaded_with() -> None:
    with pytest.raises(AssertionError, match="in reserve_shared"):
        call_in_compiler("test_reserve_shared", "reserved", 100, 5000)
