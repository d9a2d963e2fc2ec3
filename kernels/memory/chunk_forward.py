"""Forward kernels of the memory: a walk over chunks with the state on chip, and the delta rule's triangular inverse."""

import kernels.launch  # noqa: F401, I001  before triton
import triton
import triton.language as tl

from kernels.activation import sigmoid
from kernels.memory.chunk import (
    chunk_decay,
    decay_between,
    load_forgetting,
    load_tile,
    load_transposed,
    normalized_silu,
)


@triton.jit
def triangular_inverse_kernel(
    key_ptr,
    forget_ptr,
    write_ptr,
    start_ptr,
    inverse_ptr,  # [B * H, num_chunks, L, L]
    key_stride_b,
    key_stride_t,
    key_stride_h,
    forget_stride_b,
    forget_stride_t,
    forget_stride_h,
    write_stride_b,
    write_stride_t,
    write_stride_h,
    start_stride_b,
    start_stride_t,
    num_tokens,
    num_heads,
    eps,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inverse of I + A, A_ij = beta_i d_ij (k_i . k_j) for j < i: one program a chunk, lane and head.

    If X inverts the diagonal blocks of size s, then X - X C X inverts those of size 2 s, C being what A has in the
    lower left quarter of each. That is block forward substitution, as stable as substitution by rows.
    """
    num_chunks = tl.cdiv(num_tokens, LENGTH)
    i_bh = tl.program_id(0) // num_chunks
    i_chunk = tl.program_id(0) % num_chunks
    i_b = (i_bh // num_heads).to(tl.int64)
    i_h = (i_bh % num_heads).to(tl.int64)
    first = tl.cast(i_chunk, tl.int64) * LENGTH
    rows = tl.arange(0, LENGTH)
    columns = tl.arange(0, WIDTH)
    is_token = rows < num_tokens - i_chunk * LENGTH

    key_ptr += i_b * key_stride_b + i_h * key_stride_h + first * key_stride_t
    key = load_tile(key_ptr, key_stride_t, rows, columns, is_token)
    key = normalized_silu(key, eps)
    write_ptr += i_b * write_stride_b + i_h * write_stride_h + first * write_stride_t
    write = sigmoid(tl.load(write_ptr + rows * write_stride_t, mask=is_token, other=0.0).to(tl.float32))
    forget_ptr += i_b * forget_stride_b + i_h * forget_stride_h + first * forget_stride_t
    start_ptr += i_b * start_stride_b + first * start_stride_t
    logit, is_start = load_forgetting(
        forget_ptr, forget_stride_t, start_ptr, start_stride_t, rows, is_token, HAS_STARTS
    )
    coarse, fine, _, _ = chunk_decay(logit, is_start, is_token, HAS_STARTS)
    between = decay_between(coarse, fine, rows[:, None] > rows[None, :])
    overlap = tl.dot(key, tl.trans(key), input_precision="ieee") * between * write[:, None]

    inverse = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    for level in tl.static_range(LEVELS):
        size = 2**level
        i_row = rows[:, None] // size
        i_column = rows[None, :] // size
        quarter = (i_row // 2 == i_column // 2) & (i_row > i_column)
        corner = tl.where(quarter, overlap, 0.0)
        if level == 0:
            inverse -= corner
        else:
            corner = tl.dot(corner, inverse, input_precision=PRECISION)
            inverse -= tl.dot(inverse, corner, input_precision=PRECISION)
    inverse_ptr += (i_bh.to(tl.int64) * num_chunks + i_chunk) * LENGTH * LENGTH
    tl.store(inverse_ptr + rows[:, None] * LENGTH + rows[None, :], inverse.to(inverse_ptr.dtype.element_ty))


@triton.jit
def memory_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    forget_ptr,
    write_ptr,
    start_ptr,
    inverse_ptr,
    state_ptr,  # [B, H, N, N] float32, incoming
    output_ptr,  # [B, T, H, N]
    final_state_ptr,  # [B, H, N, N] float32
    states_ptr,  # [B * H, num_chunks, N, N], the state before every chunk
    writes_ptr,  # [B, T, H, N], u of the delta rule
    query_stride_b,
    query_stride_t,
    query_stride_h,
    key_stride_b,
    key_stride_t,
    key_stride_h,
    value_stride_b,
    value_stride_t,
    value_stride_h,
    forget_stride_b,
    forget_stride_t,
    forget_stride_h,
    write_stride_b,
    write_stride_t,
    write_stride_h,
    start_stride_b,
    start_stride_t,
    num_tokens,
    num_heads,
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    DELTA: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    """Walk a lane's chunks with TILE value columns of one head's state on chip.

    Writes the outputs and the final state, or, with RECOMPUTE, what the backward pass needs instead: the state before
    every chunk and the delta rule's writes.

    The state is held transposed, value channel by key channel, and so is all that has a value channel. Then the first
    factor of a product is the result of another, which the tensor cores take from registers, and queries and keys,
    which are computed in another layout, are second factors, which they take from shared memory.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    num_chunks = tl.cdiv(num_tokens, LENGTH)
    rows = tl.arange(0, LENGTH)
    channels = tl.arange(0, WIDTH)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    causal = rows[:, None] >= rows[None, :]
    token_stride = num_heads * WIDTH
    token_offsets = rows[None, :] * token_stride + columns[:, None]
    state_offsets = channels[None, :] * WIDTH + columns[:, None]

    query_ptr += i_b * query_stride_b + i_h * query_stride_h
    key_ptr += i_b * key_stride_b + i_h * key_stride_h
    value_ptr += i_b * value_stride_b + i_h * value_stride_h
    forget_ptr += i_b * forget_stride_b + i_h * forget_stride_h
    write_ptr += i_b * write_stride_b + i_h * write_stride_h
    start_ptr += i_b * start_stride_b
    inverse_ptr += i_bh * num_chunks * LENGTH * LENGTH
    states_ptr += i_bh * num_chunks * WIDTH * WIDTH
    output_ptr += (i_b * num_tokens * num_heads + i_h) * WIDTH
    writes_ptr += (i_b * num_tokens * num_heads + i_h) * WIDTH

    state = tl.load(state_ptr + i_bh * WIDTH * WIDTH + state_offsets)
    # Logits are loaded a chunk ahead: the compiler does so for tiles only.
    logit, is_start = load_forgetting(
        forget_ptr, forget_stride_t, start_ptr, start_stride_t, rows, rows < num_tokens, HAS_STARTS
    )
    for i_chunk in range(num_chunks):
        first = tl.cast(i_chunk, tl.int64) * LENGTH
        is_token = rows < num_tokens - i_chunk * LENGTH
        coarse, fine, coarse_total, fine_total = chunk_decay(logit, is_start, is_token, HAS_STARTS)
        logit, is_start = load_forgetting(
            forget_ptr + (first + LENGTH) * forget_stride_t,
            forget_stride_t,
            start_ptr + (first + LENGTH) * start_stride_t,
            start_stride_t,
            rows,
            rows < num_tokens - (i_chunk + 1) * LENGTH,
            HAS_STARTS,
        )
        from_start = tl.exp2(coarse + fine)
        to_end = tl.exp2((coarse_total - coarse) + (fine_total - fine))
        key = load_tile(key_ptr + first * key_stride_t, key_stride_t, rows, channels, is_token)
        key = normalized_silu(key, eps)
        writes = load_transposed(value_ptr + first * value_stride_t, value_stride_t, rows, columns, is_token)
        rounded_state = state.to(key.dtype)
        if RECOMPUTE:
            tl.store(states_ptr + tl.cast(i_chunk, tl.int64) * WIDTH * WIDTH + state_offsets, rounded_state)
        if DELTA:
            write = sigmoid(
                tl.load(write_ptr + (first + rows) * write_stride_t, mask=is_token, other=0.0).to(tl.float32)
            )
            expected = tl.dot(rounded_state, tl.trans(key), input_precision="ieee")
            surprise = write[None, :] * (writes.to(tl.float32) - from_start[None, :] * expected)
            inverse = tl.load(inverse_ptr + first * LENGTH + rows[:, None] * LENGTH + rows[None, :])
            writes = tl.dot(surprise.to(key.dtype), tl.trans(inverse), input_precision="ieee").to(key.dtype)
        if RECOMPUTE:
            if DELTA:
                tl.store(writes_ptr + first * token_stride + token_offsets, writes, mask=is_token[None, :])
        else:
            query = load_tile(query_ptr + first * query_stride_t, query_stride_t, rows, channels, is_token)
            query = normalized_silu(query, eps)
            scores = tl.dot(key, tl.trans(query), input_precision="ieee")
            scores *= tl.trans(decay_between(coarse, fine, causal))
            output = from_start[None, :] * tl.dot(rounded_state, tl.trans(query), input_precision="ieee")
            output = tl.dot(writes, scores.to(key.dtype), output, input_precision="ieee")
            tl.store(
                output_ptr + first * token_stride + token_offsets,
                output.to(output_ptr.dtype.element_ty),
                mask=is_token[None, :],
            )
        decayed_writes = (to_end[None, :] * writes.to(tl.float32)).to(key.dtype)
        state = tl.dot(decayed_writes, key, tl.exp2(coarse_total + fine_total) * state, input_precision="ieee")
    if not RECOMPUTE:
        tl.store(final_state_ptr + i_bh * WIDTH * WIDTH + state_offsets, state)
