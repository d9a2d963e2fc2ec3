"""Memory: fast weights written and read along a whole sequence."""

from torch import Tensor

from kernels.backend import check_backend
from kernels.memory.fused import memory_fused
from kernels.memory.reference import RULES, memory_reference

__all__ = ["RULES", "memory"]


def memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forget_logit: Tensor,
    write_logit: Tensor | None,
    state: Tensor,
    document_start: Tensor | None = None,
    *,
    rule: str = "hebbian",
    chunk_size: int = 64,
    eps: float = 1e-6,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Write and read fast weights along a sequence; see `memory_reference` for shapes and formulas."""
    check_backend(backend)
    implementation = memory_fused if backend == "fused" else memory_reference
    return implementation(
        query,
        key,
        value,
        forget_logit,
        write_logit,
        state,
        document_start,
        rule=rule,
        chunk_size=chunk_size,
        eps=eps,
    )
