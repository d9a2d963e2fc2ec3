"""Fast-weight memory in its chunk-parallel form, in plain torch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import accumulation_dtype, l2_normalize, no_autocast
from kernels.segments import segment_index

RULES = ("hebbian", "delta")


class _Chunks(NamedTuple):
    """Tokens cut into M chunks of L; decays are relative to positions in the same chunk. Leading shape `[B, H, M]`."""

    query: Tensor  # [..., L, N]
    key: Tensor  # [..., L, N]
    value: Tensor  # [..., L, N]
    write: Tensor  # [..., L, 1], the delta rule's learning rate
    between: Tensor  # [..., L, L], decay from token j to token i >= j of one document, else 0
    from_start: Tensor  # [..., L, 1], decay of the incoming state at each token, 0 after a document's start
    to_end: Tensor  # [..., L, 1], decay of each token's write at the chunk's end
    carry: Tensor  # [..., 1, 1], decay of the incoming state at the chunk's end


def memory_reference(
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
) -> tuple[Tensor, Tensor]:
    """Write keys and values into fast weights and read them with queries.

        q, k = l2norm(silu(query)), l2norm(silu(key));  lambda = sigmoid(forget_logit);  beta = sigmoid(write_logit)
        hebbian   S_t = lambda_t S_{t-1} + k_t v_t^T
        delta     S_t = lambda_t S_{t-1} + beta_t k_t (v_t - lambda_t S_{t-1}^T k_t)^T
        o_t = S_t^T q_t

    Within a chunk the recurrence is solved in closed form: the writes u (v for the Hebbian rule; for the delta rule the
    solution of a unit lower-triangular system, Yang et al. 2024) are read through a decayed causal product of queries
    and keys; only the state at chunk boundaries is sequential.

    Arguments:
        query, key, value: `[B, T, H, N]`, before their activations.
        forget_logit: `[B, T, H]`.
        write_logit: `[B, T, H]` for the delta rule, None for the Hebbian rule.
        state: S, `[B, H, N, N]`, indexed by key channel then value channel.
        document_start: `[B, T]` bool, or None; at a start the state is zero before the write.
        rule: `hebbian` or `delta`.
        chunk_size: L, tokens solved at once; a cost, not a meaning.
        eps: added to the squared norm of queries and keys.

    Returns:
        o `[B, T, H, N]` in the values' type, and the state after the last token in float32 or float64.
    """
    if rule not in RULES:
        raise ValueError(f"memory rule is {rule!r}; choose one of {', '.join(RULES)}")
    if (write_logit is not None) != (rule == "delta"):
        raise ValueError(f"write_logit goes with the delta rule alone, and the rule is {rule!r}")
    num_lanes, num_tokens, _, width = value.shape
    dtype = accumulation_dtype(value, state)
    state = state.to(dtype)
    if num_tokens == 0:
        return value, state
    with no_autocast(value):
        if document_start is None:
            document_start = torch.zeros(num_lanes, num_tokens, dtype=torch.bool, device=value.device)
        chunks = _cut(query, key, value, forget_logit, write_logit, document_start, chunk_size, dtype, eps)
        if rule == "hebbian":
            writes, reads_of_state, transition = chunks.value, None, None
        else:
            writes, reads_of_state = _solve_delta(chunks)
            transition = chunks.carry * torch.eye(width, dtype=dtype, device=value.device)
            transition = transition - (chunks.to_end * chunks.key).transpose(-1, -2) @ reads_of_state
        written = (chunks.to_end * chunks.key).transpose(-1, -2) @ writes

        incoming = []
        for i in range(chunks.key.shape[2]):
            incoming.append(state)
            carried = chunks.carry[:, :, i] * state if transition is None else transition[:, :, i] @ state
            state = carried + written[:, :, i]
        states = torch.stack(incoming, dim=2)
        if reads_of_state is not None:
            writes = writes - reads_of_state @ states
        scores = chunks.query @ chunks.key.transpose(-1, -2) * chunks.between
        output = scores @ writes + chunks.from_start * (chunks.query @ states)
        output = output.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2)
        return output.to(value.dtype), state


def _cut(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forget_logit: Tensor,
    write_logit: Tensor | None,
    document_start: Tensor,
    chunk_size: int,
    dtype: torch.dtype,
    eps: float,
) -> _Chunks:
    num_tokens = value.shape[1]
    length = min(chunk_size, num_tokens)
    padding = -num_tokens % length

    def cut(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, M, L, ...], padded with zeros, which write nothing
        x = F.pad(x.transpose(1, 2), (0, 0) * (x.dim() - 3) + (0, padding))
        return x.unflatten(2, (-1, length))

    starts = cut(document_start.unsqueeze(2))
    segment = segment_index(starts)
    # What was before a document's start is gone whatever the forgetting there; a zero keeps the sums finite.
    log_decay = cut(F.logsigmoid(forget_logit.to(dtype))).masked_fill(starts, 0.0)
    decayed = log_decay.cumsum(-1)
    same = (segment.unsqueeze(-1) == segment.unsqueeze(-2)).tril()
    difference = decayed.unsqueeze(-1) - decayed.unsqueeze(-2)
    untouched = (segment == 0).to(dtype)
    in_last = (segment == segment[..., -1:]).to(dtype)
    write = torch.ones_like(forget_logit, dtype=dtype) if write_logit is None else torch.sigmoid(write_logit.to(dtype))
    return _Chunks(
        query=cut(l2_normalize(F.silu(query.to(dtype)), eps)),
        key=cut(l2_normalize(F.silu(key.to(dtype)), eps)),
        value=cut(value.to(dtype)),
        write=cut(write).unsqueeze(-1),
        between=difference.masked_fill(~same, float("-inf")).exp(),
        from_start=(decayed.exp() * untouched).unsqueeze(-1),
        to_end=((decayed[..., -1:] - decayed).exp() * in_last).unsqueeze(-1),
        carry=(decayed[..., -1].exp() * untouched[..., -1])[..., None, None],
    )


def _solve_delta(chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """The delta rule's writes as u = own - reads @ S, S the state at the chunk's start; returns (own, reads).

    u_i + beta_i sum_{j<i} d_ij (k_i . k_j) u_j = beta_i (v_i - d_i S^T k_i) is unit lower triangular in u.
    """
    overlap = (chunks.write * (chunks.key @ chunks.key.transpose(-1, -2)) * chunks.between).tril(-1)
    right = torch.cat([chunks.write * chunks.value, chunks.write * chunks.from_start * chunks.key], dim=-1)
    # With unitriangular=True the diagonal is taken as one, whatever is stored there.
    solved = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)
    own, reads = solved.chunk(2, dim=-1)
    return own, reads
