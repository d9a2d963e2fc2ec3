"""The memory's backward walk: the gradient of the state after every chunk, and of the delta rule's writes."""

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
    # Logits are loaded a chunk ahead: the compiler does so for tiles only.
    first = tl.cast(num_chunks - 1, tl.int64) * LENGTH
    logit, is_start = load_forgetting(
        forget_ptr + first * forget_stride_t,
        forget_stride_t,
        start_ptr + first * start_stride_t,
        start_stride_t,
        rows,
        rows < num_tokens - (num_chunks - 1) * LENGTH,
        HAS_STARTS,
    )
    for i_done in range(num_chunks):
        i_chunk = num_chunks - 1 - i_done
        first = tl.cast(i_chunk, tl.int64) * LENGTH
        is_token = rows < num_tokens - i_chunk * LENGTH
        coarse, fine, coarse_total, fine_total = chunk_decay(logit, is_start, is_token, HAS_STARTS)
        logit, is_start = load_forgetting(
            forget_ptr + (first - LENGTH) * forget_stride_t,
            forget_stride_t,
            start_ptr + (first - LENGTH) * start_stride_t,
            start_stride_t,
            rows,
            (rows < LENGTH) & (i_chunk > 0),
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
