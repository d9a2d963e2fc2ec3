"""Backward kernels of the memory: a reverse walk for the state's gradient, then every chunk's gradients in parallel."""

import kernels.launch  # noqa: F401, I001  before triton
import triton
import triton.language as tl

from kernels.activation import sigmoid
from kernels.memory.chunk import (
    chunk_decay,
    decay_between,
    load_tile,
    load_transposed,
    normalized_silu,
    normalized_silu_gradient,
)


@triton.jit
def memory_state_gradient_kernel(
    query_ptr,
    key_ptr,
    forget_ptr,
    write_ptr,
    start_ptr,
    inverse_ptr,  # [B * H, num_chunks, L, L]
    output_grad_ptr,
    final_state_grad_ptr,  # [B, H, N, N] float32
    state_grads_ptr,  # [B * H, num_chunks, N, N], the gradient of the state after every chunk
    surprise_grad_ptr,  # [B, T, H, N], y of the delta rule
    state_grad_ptr,  # [B, H, N, N] float32, of the incoming state
    query_stride_b,
    query_stride_t,
    query_stride_h,
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
    output_grad_stride_b,
    output_grad_stride_t,
    output_grad_stride_h,
    num_tokens,
    num_heads,
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    DELTA: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_STATE_GRAD: tl.constexpr,
):
    """Walk a lane's chunks backwards with TILE value columns of the gradient of one head's state on chip.

    For the delta rule, whose writes are u = X b with b_i = beta_i (v_i - d_i S^T k_i), the gradient of a write depends
    on that of the later state, so y = X^T du is found here too. Layouts are those of the forward walk.
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
    forget_ptr += i_b * forget_stride_b + i_h * forget_stride_h
    write_ptr += i_b * write_stride_b + i_h * write_stride_h
    start_ptr += i_b * start_stride_b
    output_grad_ptr += i_b * output_grad_stride_b + i_h * output_grad_stride_h
    inverse_ptr += i_bh * num_chunks * LENGTH * LENGTH
    state_grads_ptr += i_bh * num_chunks * WIDTH * WIDTH
    surprise_grad_ptr += (i_b * num_tokens * num_heads + i_h) * WIDTH

    if HAS_STATE_GRAD:
        state_grad = tl.load(final_state_grad_ptr + i_bh * WIDTH * WIDTH + state_offsets)
    else:
        state_grad = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    for i_done in range(num_chunks):
        i_chunk = num_chunks - 1 - i_done
        first = tl.cast(i_chunk, tl.int64) * LENGTH
        is_token = rows < num_tokens - i_chunk * LENGTH
        coarse, fine, coarse_total, fine_total = chunk_decay(
            forget_ptr + first * forget_stride_t,
            forget_stride_t,
            start_ptr + first * start_stride_t,
            start_stride_t,
            rows,
            is_token,
            HAS_STARTS,
        )
        from_start = tl.exp2(coarse + fine)
        query = load_tile(query_ptr + first * query_stride_t, query_stride_t, rows, channels, is_token)
        query = normalized_silu(query, eps)
        output_grad = load_transposed(
            output_grad_ptr + first * output_grad_stride_t, output_grad_stride_t, rows, columns, is_token
        )
        rounded_grad = state_grad.to(query.dtype)
        tl.store(state_grads_ptr + tl.cast(i_chunk, tl.int64) * WIDTH * WIDTH + state_offsets, rounded_grad)
        state_grad = tl.exp2(coarse_total + fine_total) * state_grad
        if DELTA:
            to_end = tl.exp2((coarse_total - coarse) + (fine_total - fine))
            key = load_tile(key_ptr + first * key_stride_t, key_stride_t, rows, channels, is_token)
            key = normalized_silu(key, eps)
            write = sigmoid(
                tl.load(write_ptr + (first + rows) * write_stride_t, mask=is_token, other=0.0).to(tl.float32)
            )
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * decay_between(coarse, fine, causal)
            writes_grad = to_end[None, :] * tl.dot(rounded_grad, tl.trans(key), input_precision="ieee")
            writes_grad = tl.dot(output_grad, scores.to(key.dtype), writes_grad, input_precision="ieee")
            inverse = tl.load(inverse_ptr + first * LENGTH + rows[:, None] * LENGTH + rows[None, :])
            surprise_grad = tl.dot(writes_grad.to(key.dtype), inverse, input_precision="ieee")
            tl.store(
                surprise_grad_ptr + first * token_stride + token_offsets,
                surprise_grad.to(surprise_grad_ptr.dtype.element_ty),
                mask=is_token[None, :],
            )
            expected_grad = (-(write * from_start)[None, :] * surprise_grad).to(key.dtype)
            state_grad = tl.dot(expected_grad, key, state_grad, input_precision="ieee")
        decayed_grad = (from_start[None, :] * output_grad.to(tl.float32)).to(query.dtype)
        state_grad = tl.dot(decayed_grad, query, state_grad, input_precision="ieee")
    tl.store(state_grad_ptr + i_bh * WIDTH * WIDTH + state_offsets, state_grad)


@triton.jit
def memory_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,  # hebbian only
    forget_ptr,
    write_ptr,
    start_ptr,
    states_ptr,  # [B * H, num_chunks, N, N], before every chunk
    state_grads_ptr,  # [B * H, num_chunks, N, N], after every chunk
    writes_ptr,  # [B, T, H, N], u of the delta rule
    surprise_grad_ptr,  # [B, T, H, N], y of the delta rule
    output_grad_ptr,
    query_grad_ptr,  # [B, T, H, N]
    key_grad_ptr,  # [B, T, H, N]
    value_grad_ptr,  # [B, T, H, N]
    forget_grad_ptr,  # [B, T, H]
    write_grad_ptr,  # [B, T, H]
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
    output_grad_stride_b,
    output_grad_stride_t,
    output_grad_stride_h,
    num_tokens,
    num_heads,
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    DELTA: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """Gradients of one chunk of one lane and head, given the state before it and the gradient of the state after it."""
    num_chunks = tl.cdiv(num_tokens, LENGTH)
    i_bh = (tl.program_id(0) // num_chunks).to(tl.int64)
    i_chunk = tl.program_id(0) % num_chunks
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    first = tl.cast(i_chunk, tl.int64) * LENGTH
    rows = tl.arange(0, LENGTH)
    channels = tl.arange(0, WIDTH)
    is_token = rows < num_tokens - i_chunk * LENGTH
    causal = rows[:, None] >= rows[None, :]

    query_ptr += i_b * query_stride_b + i_h * query_stride_h + first * query_stride_t
    key_ptr += i_b * key_stride_b + i_h * key_stride_h + first * key_stride_t
    value_ptr += i_b * value_stride_b + i_h * value_stride_h + first * value_stride_t
    forget_ptr += i_b * forget_stride_b + i_h * forget_stride_h + first * forget_stride_t
    write_ptr += i_b * write_stride_b + i_h * write_stride_h + first * write_stride_t
    start_ptr += i_b * start_stride_b + first * start_stride_t
    output_grad_ptr += i_b * output_grad_stride_b + i_h * output_grad_stride_h + first * output_grad_stride_t
    states_ptr += (i_bh * num_chunks + i_chunk) * WIDTH * WIDTH
    state_grads_ptr += (i_bh * num_chunks + i_chunk) * WIDTH * WIDTH
    token_stride = num_heads * WIDTH
    i_token = (i_b * num_tokens + first) * num_heads + i_h
    writes_ptr += i_token * WIDTH
    surprise_grad_ptr += i_token * WIDTH
    value_grad_ptr += i_token * WIDTH

    coarse, fine, coarse_total, fine_total = chunk_decay(
        forget_ptr, forget_stride_t, start_ptr, start_stride_t, rows, is_token, HAS_STARTS
    )
    from_start = tl.exp2(coarse + fine)
    to_end = tl.exp2((coarse_total - coarse) + (fine_total - fine))
    between = decay_between(coarse, fine, causal)
    query = load_tile(query_ptr, query_stride_t, rows, channels, is_token)
    query = normalized_silu(query, eps)
    key = load_tile(key_ptr, key_stride_t, rows, channels, is_token)
    key = normalized_silu(key, eps)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")

    # Gradients of queries and keys are held transposed, channel by token: see the forward walk.
    scores_grad = tl.zeros([LENGTH, LENGTH], dtype=tl.float32)
    query_grad = tl.zeros([WIDTH, LENGTH], dtype=tl.float32)
    key_grad = tl.zeros([WIDTH, LENGTH], dtype=tl.float32)
    if DELTA:
        write = sigmoid(tl.load(write_ptr + rows * write_stride_t, mask=is_token, other=0.0).to(tl.float32))
        system_grad = tl.zeros([LENGTH, LENGTH], dtype=tl.float32)
    for i_tile in range(0, WIDTH, TILE):
        columns = i_tile + tl.arange(0, TILE)
        output_grad = load_tile(output_grad_ptr, output_grad_stride_t, rows, columns, is_token)
        state = tl.load(states_ptr + channels[:, None] * WIDTH + columns[None, :])
        if DELTA:
            writes = load_tile(writes_ptr, token_stride, rows, columns, is_token)
            surprise_grad = load_tile(surprise_grad_ptr, token_stride, rows, columns, is_token)
            system_grad = tl.dot(surprise_grad, tl.trans(writes), system_grad, input_precision="ieee")
            value_grad = write[:, None] * surprise_grad.to(tl.float32)
            expected = (-from_start[:, None] * value_grad).to(key.dtype)
            key_grad = tl.dot(state, tl.trans(expected), key_grad, input_precision="ieee")
            tl.store(
                value_grad_ptr + rows[:, None] * token_stride + columns[None, :],
                value_grad.to(value_grad_ptr.dtype.element_ty),
                mask=is_token[:, None],
            )
        else:
            writes = load_tile(value_ptr, value_stride_t, rows, columns, is_token)
        scores_grad = tl.dot(output_grad, tl.trans(writes), scores_grad, input_precision="ieee")
        query_grad = tl.dot(state, tl.trans(output_grad), query_grad, input_precision="ieee")
    query_grad *= from_start[None, :]
    reads = tl.sum(query_grad * tl.trans(query).to(tl.float32), 0)
    if DELTA:
        expected_reads = tl.sum(key_grad * tl.trans(key).to(tl.float32), 0)
        reads += expected_reads
    else:
        weights = (scores * between).to(key.dtype)

    carried = 0.0
    for i_tile in range(0, WIDTH, TILE):
        columns = i_tile + tl.arange(0, TILE)
        state_offsets = channels[:, None] * WIDTH + columns[None, :]
        state_grad = tl.load(state_grads_ptr + state_offsets)
        carried += tl.sum(tl.load(states_ptr + state_offsets).to(tl.float32) * state_grad.to(tl.float32))
        if DELTA:
            writes = load_tile(writes_ptr, token_stride, rows, columns, is_token)
        else:
            writes = load_tile(value_ptr, value_stride_t, rows, columns, is_token)
            output_grad = load_transposed(output_grad_ptr, output_grad_stride_t, rows, columns, is_token)
            value_grad = to_end[None, :] * tl.dot(tl.trans(state_grad), tl.trans(key), input_precision="ieee")
            value_grad = tl.dot(output_grad, weights, value_grad, input_precision="ieee")
            tl.store(
                value_grad_ptr + rows[None, :] * token_stride + columns[:, None],
                value_grad.to(value_grad_ptr.dtype.element_ty),
                mask=is_token[None, :],
            )
        decayed_writes = (to_end[:, None] * writes.to(tl.float32)).to(key.dtype)
        key_grad = tl.dot(state_grad, tl.trans(decayed_writes), key_grad, input_precision="ieee")
    left = tl.sum(key_grad * tl.trans(key).to(tl.float32), 0)

    # The decay of token t scales every path from before t to t or later: pairs of tokens on either side of it, reads of
    # the incoming state at or after it, writes before it that reach the final state, and the state carried across.
    scores_grad *= between
    pairs = scores_grad * scores
    if DELTA:
        left -= expected_reads
        write_grad = tl.sum(tl.where(rows[:, None] == rows[None, :], system_grad, 0.0), 1) * (1.0 - write)
        tl.store(
            write_grad_ptr + i_token + rows * num_heads, write_grad.to(write_grad_ptr.dtype.element_ty), mask=is_token
        )
        overlap = tl.dot(key, tl.trans(key), input_precision="ieee")
        overlap_grad = tl.where(rows[:, None] > rows[None, :], -write[:, None] * between * system_grad, 0.0)
        pairs += overlap_grad * overlap
        # The overlap of two keys has a gradient to both.
        both = (overlap_grad + tl.trans(overlap_grad)).to(key.dtype)
        key_grad = tl.dot(tl.trans(key), both, key_grad, input_precision="ieee")
    rounded = scores_grad.to(key.dtype)
    query_grad = tl.dot(tl.trans(key), tl.trans(rounded), query_grad, input_precision="ieee")
    key_grad = tl.dot(tl.trans(query), rounded, key_grad, input_precision="ieee")

    change = tl.sum(pairs, 0) - tl.sum(pairs, 1) - reads + left
    decay_grad = tl.cumsum(change, 0) - change + tl.sum(reads, 0) + tl.exp2(coarse_total + fine_total) * carried
    logit = tl.load(forget_ptr + rows * forget_stride_t, mask=is_token, other=0.0).to(tl.float32)
    forget_grad = decay_grad * sigmoid(-logit)
    if HAS_STARTS:
        is_start = tl.load(start_ptr + rows * start_stride_t, mask=is_token, other=0) != 0
        forget_grad = tl.where(is_start, 0.0, forget_grad)
    tl.store(
        forget_grad_ptr + i_token + rows * num_heads, forget_grad.to(forget_grad_ptr.dtype.element_ty), mask=is_token
    )

    token_offsets = i_token * WIDTH + rows[:, None] * token_stride + channels[None, :]
    raw = load_tile(query_ptr, query_stride_t, rows, channels, is_token)
    query_grad = normalized_silu_gradient(raw, tl.trans(query_grad), eps)
    tl.store(query_grad_ptr + token_offsets, query_grad.to(query_grad_ptr.dtype.element_ty), mask=is_token[:, None])
    raw = load_tile(key_ptr, key_stride_t, rows, channels, is_token)
    key_grad = normalized_silu_gradient(raw, tl.trans(key_grad), eps)
    tl.store(key_grad_ptr + token_offsets, key_grad.to(key_grad_ptr.dtype.element_ty), mask=is_token[:, None])
