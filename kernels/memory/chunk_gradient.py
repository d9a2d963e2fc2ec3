"""The memory's backward pass within chunks: gradients of queries, keys, values and logits, every chunk in parallel."""

import kernels.launch  # noqa: F401, I001  before triton
import triton
import triton.language as tl

from kernels.activation import sigmoid
from kernels.memory.chunk import chunk_decay, load_forgetting, load_tile, silu_and_norm


@triton.jit
def decay_until(coarse, fine, later):
    """`[L, L]`: decay from token j, the row, to token i >= j, the column; zero elsewhere and across a start."""
    difference = (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
    return tl.where(later, tl.exp2(tl.minimum(difference, 0.0)), 0.0)


@triton.jit
def load_tile_again(ptr, row_stride, rows, columns, is_token):
    """`load_tile` of what is not needed after this; being another load, it is not kept in registers since the first."""
    offsets = rows[:, None] * row_stride + columns[None, :]
    return tl.load(ptr + offsets, mask=is_token[:, None], other=0.0, eviction_policy="evict_first")


@triton.jit
def plain_layout(product, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The product itself, cut off from the tensor cores' layout.

    Triton gives what is computed with a product the product's layout, and computes silu again there; after a change of
    shape and back it moves the product to the layout of the loads instead, once.
    """
    even, odd = tl.split(tl.reshape(product, [ROWS, COLUMNS // 2, 2]))
    return tl.reshape(tl.join(even, odd), [ROWS, COLUMNS])


@triton.jit
def normalized_silu_gradient(x, inverse_norm, gradient):
    """The gradient of x from that of l2norm(silu(x)), and the latter's product with l2norm(silu(x)), in float32.

    The products of queries and keys with their gradients must cancel to the last digit, so that l2norm(silu(x)) is
    rounded here as the tensor cores were given it.
    """
    raw = x.to(tl.float32)
    gate = sigmoid(raw)
    inverse_norm = inverse_norm[:, None]
    unit = (raw * gate * inverse_norm).to(x.dtype).to(tl.float32)
    along = tl.sum(unit * gradient, 1)
    return inverse_norm * (gradient - along[:, None] * unit) * gate * (1.0 + raw * (1.0 - gate)), along


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
    query_grad_ptr,  # [B, T, H, N], as are the next two, all with the strides of input_grad
    key_grad_ptr,
    value_grad_ptr,
    forget_grad_ptr,  # [B, T, H], contiguous
    write_grad_ptr,  # [B, T, H], contiguous
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
    input_grad_stride_b,
    input_grad_stride_t,
    input_grad_stride_h,
    num_tokens,
    num_heads,
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    DELTA: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """Gradients of one chunk of one lane and head, given the state before it and the gradient of the state after it.

    Products of two tokens are held with the earlier one, j, as the row and the later, i, as the column: then those that
    follow take them from registers, all but one. A loop over TILE value columns that covers them all is no loop, and
    what it loads again is loaded once. Queries are done with before keys are begun: registers hold one of the two.
    """
    num_chunks = tl.cdiv(num_tokens, LENGTH)
    i_bh = (tl.program_id(0) // num_chunks).to(tl.int64)
    i_chunk = tl.program_id(0) % num_chunks
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    first = tl.cast(i_chunk, tl.int64) * LENGTH
    rows = tl.arange(0, LENGTH)
    channels = tl.arange(0, WIDTH)
    is_token = rows < num_tokens - i_chunk * LENGTH

    query_ptr += i_b * query_stride_b + i_h * query_stride_h + first * query_stride_t
    key_ptr += i_b * key_stride_b + i_h * key_stride_h + first * key_stride_t
    forget_ptr += i_b * forget_stride_b + i_h * forget_stride_h + first * forget_stride_t
    start_ptr += i_b * start_stride_b + first * start_stride_t
    output_grad_ptr += i_b * output_grad_stride_b + i_h * output_grad_stride_h + first * output_grad_stride_t
    i_input_grad = i_b * input_grad_stride_b + i_h * input_grad_stride_h + first * input_grad_stride_t
    query_grad_ptr += i_input_grad
    key_grad_ptr += i_input_grad
    value_grad_ptr += i_input_grad
    states_ptr += (i_bh * num_chunks + i_chunk) * WIDTH * WIDTH
    state_grads_ptr += (i_bh * num_chunks + i_chunk) * WIDTH * WIDTH
    i_token = (i_b * num_tokens + first) * num_heads + i_h
    if DELTA:
        write_ptr += i_b * write_stride_b + i_h * write_stride_h + first * write_stride_t
        surprise_grad_ptr += i_token * WIDTH
        writes_ptr += i_token * WIDTH
        token_stride = num_heads * WIDTH
        writes_stride = token_stride
    else:
        writes_ptr = value_ptr + i_b * value_stride_b + i_h * value_stride_h + first * value_stride_t
        writes_stride = value_stride_t

    logit, is_start = load_forgetting(
        forget_ptr, forget_stride_t, start_ptr, start_stride_t, rows, is_token, HAS_STARTS
    )
    raw_query = load_tile(query_ptr, query_stride_t, rows, channels, is_token)
    raw_key = load_tile(key_ptr, key_stride_t, rows, channels, is_token)
    scores_grad = tl.zeros([LENGTH, LENGTH], dtype=tl.float32)
    if DELTA:
        system_grad = tl.zeros([LENGTH, LENGTH], dtype=tl.float32)
    for i_tile in range(0, WIDTH, TILE):
        columns = i_tile + tl.arange(0, TILE)
        output_grad = load_tile(output_grad_ptr, output_grad_stride_t, rows, columns, is_token)
        writes = load_tile(writes_ptr, writes_stride, rows, columns, is_token)
        scores_grad = tl.dot(writes, tl.trans(output_grad), scores_grad, input_precision="ieee")
        if DELTA:
            surprise_grad = load_tile(surprise_grad_ptr, token_stride, rows, columns, is_token)
            system_grad = tl.dot(writes, tl.trans(surprise_grad), system_grad, input_precision="ieee")

    coarse, fine, coarse_total, fine_total = chunk_decay(logit, is_start, is_token, HAS_STARTS)
    from_start = tl.exp2(coarse + fine)
    to_end = tl.exp2((coarse_total - coarse) + (fine_total - fine))
    between = decay_until(coarse, fine, rows[:, None] <= rows[None, :])
    activity, query_norm = silu_and_norm(raw_query, eps)
    query = (activity * query_norm[:, None]).to(raw_query.dtype)
    activity, key_norm = silu_and_norm(raw_key, eps)
    key = (activity * key_norm[:, None]).to(raw_key.dtype)

    # The decay of token t scales every path from before t to t or later: pairs of tokens on either side of it, reads of
    # the incoming state at or after it, writes before it that reach the final state, and the state carried across.
    # Pairs are counted by the products of queries and keys with their gradients.
    scores = tl.dot(key, tl.trans(query), input_precision="ieee")
    rounded = (scores_grad * between).to(key.dtype)
    reads = -tl.sum(rounded.to(tl.float32) * scores)
    if DELTA:
        write = sigmoid(tl.load(write_ptr + rows * write_stride_t, mask=is_token, other=0.0).to(tl.float32))
        write_grad = tl.sum(tl.where(rows[:, None] == rows[None, :], system_grad, 0.0), 0) * (1.0 - write)
        tl.store(
            write_grad_ptr + i_token + rows * num_heads, write_grad.to(write_grad_ptr.dtype.element_ty), mask=is_token
        )
        overlap_grad = tl.where(rows[:, None] < rows[None, :], -write[None, :] * between * system_grad, 0.0)
        overlap_grad = overlap_grad.to(key.dtype)
    else:
        weights = (scores * between).to(key.dtype)

    grad_offsets = rows[:, None] * input_grad_stride_t + channels[None, :]
    query_grad = tl.zeros([LENGTH, WIDTH], dtype=tl.float32)
    for i_tile in range(0, WIDTH, TILE):
        columns = i_tile + tl.arange(0, TILE)
        output_grad = load_tile(output_grad_ptr, output_grad_stride_t, rows, columns, is_token)
        state = tl.load(states_ptr + channels[:, None] * WIDTH + columns[None, :])
        query_grad = tl.dot(output_grad, tl.trans(state), query_grad, input_precision="ieee")
    query_grad *= from_start[:, None]
    query_grad = tl.dot(tl.trans(rounded), key, query_grad, input_precision="ieee")
    raw_query = load_tile_again(query_ptr, query_stride_t, rows, channels, is_token)
    query_grad, along_query = normalized_silu_gradient(raw_query, query_norm, plain_layout(query_grad, LENGTH, WIDTH))
    tl.store(query_grad_ptr + grad_offsets, query_grad.to(query_grad_ptr.dtype.element_ty), mask=is_token[:, None])
    change = -along_query
    reads += tl.sum(along_query, 0)

    key_grad = tl.zeros([LENGTH, WIDTH], dtype=tl.float32)
    if DELTA:
        for i_tile in range(0, WIDTH, TILE):
            columns = i_tile + tl.arange(0, TILE)
            surprise_grad = load_tile(surprise_grad_ptr, token_stride, rows, columns, is_token)
            value_grad = write[:, None] * surprise_grad.to(tl.float32)
            value_grad_offsets = rows[:, None] * input_grad_stride_t + columns[None, :]
            tl.store(
                value_grad_ptr + value_grad_offsets,
                value_grad.to(value_grad_ptr.dtype.element_ty),
                mask=is_token[:, None],
            )
            state = tl.load(states_ptr + channels[:, None] * WIDTH + columns[None, :])
            expected = (-from_start[:, None] * value_grad).to(key.dtype)
            key_grad = tl.dot(expected, tl.trans(state), key_grad, input_precision="ieee")
        # What is read of the state and of earlier keys, to be subtracted from what a key finds there.
        reads += tl.sum(key_grad * key.to(tl.float32))
        key_grad = tl.dot(tl.trans(overlap_grad), key, key_grad, input_precision="ieee")
        change -= 2.0 * tl.sum(key_grad * key.to(tl.float32), 1)
    carried = 0.0
    for i_tile in range(0, WIDTH, TILE):
        columns = i_tile + tl.arange(0, TILE)
        state_offsets = channels[:, None] * WIDTH + columns[None, :]
        writes = load_tile(writes_ptr, writes_stride, rows, columns, is_token)
        state_grad = tl.load(state_grads_ptr + state_offsets)
        carried += tl.sum(tl.load(states_ptr + state_offsets).to(tl.float32) * state_grad.to(tl.float32))
        if DELTA:
            writes = (to_end[:, None] * writes.to(tl.float32)).to(key.dtype)
        else:
            output_grad = load_tile(output_grad_ptr, output_grad_stride_t, rows, columns, is_token)
            value_grad = to_end[:, None] * tl.dot(key, state_grad, input_precision="ieee")
            value_grad = tl.dot(weights, output_grad, value_grad, input_precision="ieee")
            value_grad_offsets = rows[:, None] * input_grad_stride_t + columns[None, :]
            tl.store(
                value_grad_ptr + value_grad_offsets,
                value_grad.to(value_grad_ptr.dtype.element_ty),
                mask=is_token[:, None],
            )
        key_grad = tl.dot(writes, tl.trans(state_grad), key_grad, input_precision="ieee")
    if DELTA:
        key_grad = tl.dot(overlap_grad, key, key_grad, input_precision="ieee")
    else:
        key_grad *= to_end[:, None]
    key_grad = tl.dot(rounded, query, key_grad, input_precision="ieee")
    raw_key = load_tile_again(key_ptr, key_stride_t, rows, channels, is_token)
    key_grad, along_key = normalized_silu_gradient(raw_key, key_norm, plain_layout(key_grad, LENGTH, WIDTH))
    tl.store(key_grad_ptr + grad_offsets, key_grad.to(key_grad_ptr.dtype.element_ty), mask=is_token[:, None])
    change += along_key

    decay_grad = tl.cumsum(change, 0) - change + reads + tl.exp2(coarse_total + fine_total) * carried
    forget_grad = decay_grad * sigmoid(-logit)
    if HAS_STARTS:
        forget_grad = tl.where(is_start, 0.0, forget_grad)
    tl.store(
        forget_grad_ptr + i_token + rows * num_heads, forget_grad.to(forget_grad_ptr.dtype.element_ty), mask=is_token
    )
