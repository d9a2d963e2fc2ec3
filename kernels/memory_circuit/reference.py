"""A fast-weight layer's circuit in plain torch."""

from torch import Tensor

from kernels.gated_norm import gated_norm
from kernels.linear import linear
from kernels.memory import memory
from kernels.precision import full_precision_linear


def memory_circuit_reference(
    h: Tensor,
    in_projection: Tensor,
    forget: Tensor,
    forget_bias: Tensor,
    write: Tensor | None,
    write_bias: Tensor | None,
    out_projection: Tensor,
    state: Tensor,
    document_start: Tensor | None = None,
    *,
    rule: str,
    chunk_size: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """[q, k, v, z] = W_in h;  o = fast weights' reads;  W_out (rms_per_head(o) * silu(z)).

    Arguments:
        h: the normalised workspace, `[B, T, D]`.
        in_projection, forget, forget_bias, write, write_bias, out_projection: see `MemoryWeights`.
        state: S before the first token, `[B, H, N, N]`.
        document_start: `[B, T]` bool, or None.
        rule, chunk_size, eps: as for `kernels.memory.memory`.

    Returns:
        What the circuit writes `[B, T, D]`, and S after the last token.
    """
    num_heads = forget.shape[0]
    query, key, value, gate = linear(h, in_projection).chunk(4, dim=-1)
    query, key, value = (z.unflatten(-1, (num_heads, -1)) for z in (query, key, value))
    write_logit = None
    if write is not None:
        assert write_bias is not None
        write_logit = full_precision_linear(h, write, write_bias)
    read, state = memory(
        query,
        key,
        value,
        full_precision_linear(h, forget, forget_bias),
        write_logit,
        state,
        document_start,
        rule=rule,
        chunk_size=chunk_size,
        eps=eps,
    )
    activity = gated_norm(read.flatten(-2), gate, group_size=value.shape[-1], eps=eps)
    return linear(activity, out_projection), state
