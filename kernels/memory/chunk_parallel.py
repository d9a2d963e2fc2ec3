"""The Hebbian memory with every chunk in parallel, for few lanes: walks over chunks would leave most of a GPU idle.

What a chunk adds to the state, sum_j d_j k_j v_j^T, needs no other chunk; neither do its outputs once the state before
it is known. What remains to be walked is one multiply-add an element of the state and chunk. The gradient of the state
is such a walk too, backwards, over sum_i d_i q_i do_i^T. The price is memory: the sums of all chunks, in float32.
"""

import kernels.launch  # noqa: F401, I001  before triton
import triton
import triton.language as tl

from kernels.memory.chunk import chunk_decay, decay_between, load_forgetting, load_tile, normalized_silu


@triton.jit
def memory_chunk_sum_kernel(
    left_ptr,  # keys, or queries
    right_ptr,  # values, or the gradients of outputs
    forget_ptr,
    start_ptr,
    sums_ptr,  # [B * H, num_chunks, N, N] float32
    carries_ptr,  # [B * H, num_chunks] float32, the decay over a whole chunk
    left_stride_b,
    left_stride_t,
    left_stride_h,
    right_stride_b,
    right_stride_t,
    right_stride_h,
    forget_stride_b,
    forget_stride_t,
    forget_stride_h,
    start_stride_b,
    start_stride_t,
    num_tokens,
    num_heads,
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    TO_END: tl.constexpr,
):
    """Sum over one chunk of l2norm(silu(left)) right^T, TILE of its columns, each token decayed to the chunk's end, or,
    without TO_END, from the chunk's start."""
    num_chunks = tl.cdiv(num_tokens, LENGTH)
    i_bh = (tl.program_id(0) // num_chunks).to(tl.int64)
    i_chunk = tl.program_id(0) % num_chunks
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    first = tl.cast(i_chunk, tl.int64) * LENGTH
    rows = tl.arange(0, LENGTH)
    channels = tl.arange(0, WIDTH)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_token = rows < num_tokens - i_chunk * LENGTH

    left_ptr += i_b * left_stride_b + i_h * left_stride_h + first * left_stride_t
    right_ptr += i_b * right_stride_b + i_h * right_stride_h + first * right_stride_t
    forget_ptr += i_b * forget_stride_b + i_h * forget_stride_h + first * forget_stride_t
    start_ptr += i_b * start_stride_b + first * start_stride_t
    logit, is_start = load_forgetting(
        forget_ptr, forget_stride_t, start_ptr, start_stride_t, rows, is_token, HAS_STARTS
    )
    left = load_tile(left_ptr, left_stride_t, rows, channels, is_token)
    right = load_tile(right_ptr, right_stride_t, rows, columns, is_token)
    coarse, fine, coarse_total, fine_total = chunk_decay(logit, is_start, is_token, HAS_STARTS)
    decay = tl.exp2(coarse_total - coarse + (fine_total - fine) if TO_END else coarse + fine)
    left = normalized_silu(left, eps)
    right = (decay[:, None] * right.to(tl.float32)).to(left.dtype)
    total = tl.dot(tl.trans(left), right, input_precision="ieee")
    i_sum = i_bh * num_chunks + i_chunk
    tl.store(sums_ptr + i_sum * WIDTH * WIDTH + channels[:, None] * WIDTH + columns[None, :], total)
    if tl.program_id(1) == 0:
        tl.store(carries_ptr + i_sum, tl.exp2(coarse_total + fine_total))


@triton.jit(do_not_specialize=("num_chunks",))
def memory_chunk_walk_kernel(
    sums_ptr,
    carries_ptr,
    state_ptr,  # [B * H, N, N] float32, where the walk begins
    states_ptr,  # [B * H, num_chunks, N, N], before every chunk in the walk's direction
    final_state_ptr,  # [B * H, N, N] float32, where it ends
    num_chunks,
    SIZE: tl.constexpr,  # N * N
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """Walk over chunks with BLOCK elements of one head's state: state = carry state + sum."""
    i_bh = tl.program_id(0).to(tl.int64)
    elements = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if BACKWARD:
        step = -1
        i_chunk = i_bh * num_chunks + num_chunks - 1
    else:
        step = 1
        i_chunk = i_bh * num_chunks
    state = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_STATE:
        state = tl.load(state_ptr + i_bh * SIZE + elements)
    # Sums are asked for four chunks ahead.
    sums_ptr += i_chunk * SIZE + elements
    carries_ptr += i_chunk
    states_ptr += i_chunk * SIZE + elements
    sum0 = tl.load(sums_ptr)
    sum1 = tl.load(sums_ptr + step * SIZE, mask=num_chunks > 1, other=0.0)
    sum2 = tl.load(sums_ptr + 2 * step * SIZE, mask=num_chunks > 2, other=0.0)
    sum3 = tl.load(sums_ptr + 3 * step * SIZE, mask=num_chunks > 3, other=0.0)
    carry0 = tl.load(carries_ptr)
    carry1 = tl.load(carries_ptr + step, mask=num_chunks > 1, other=0.0)
    carry2 = tl.load(carries_ptr + 2 * step, mask=num_chunks > 2, other=0.0)
    carry3 = tl.load(carries_ptr + 3 * step, mask=num_chunks > 3, other=0.0)
    i = 0
    while i < num_chunks:
        tl.store(states_ptr, state.to(states_ptr.dtype.element_ty))
        state = carry0 * state + sum0
        sum0 = sum1
        sum1 = sum2
        sum2 = sum3
        carry0 = carry1
        carry1 = carry2
        carry2 = carry3
        sum3 = tl.load(sums_ptr + 4 * step * SIZE, mask=i + 4 < num_chunks, other=0.0)
        carry3 = tl.load(carries_ptr + 4 * step, mask=i + 4 < num_chunks, other=0.0)
        sums_ptr += step * SIZE
        carries_ptr += step
        states_ptr += step * SIZE
        i += 1
    tl.store(final_state_ptr + i_bh * SIZE + elements, state)


@triton.jit
def memory_chunk_output_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    forget_ptr,
    start_ptr,
    states_ptr,  # [B * H, num_chunks, N, N], before every chunk
    output_ptr,  # [B, T, H, N]
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
    start_stride_b,
    start_stride_t,
    num_tokens,
    num_heads,
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """TILE channels of the outputs of one chunk, lane and head, given the state before it."""
    num_chunks = tl.cdiv(num_tokens, LENGTH)
    i_bh = (tl.program_id(0) // num_chunks).to(tl.int64)
    i_chunk = tl.program_id(0) % num_chunks
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    first = tl.cast(i_chunk, tl.int64) * LENGTH
    rows = tl.arange(0, LENGTH)
    channels = tl.arange(0, WIDTH)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_token = rows < num_tokens - i_chunk * LENGTH

    query_ptr += i_b * query_stride_b + i_h * query_stride_h + first * query_stride_t
    key_ptr += i_b * key_stride_b + i_h * key_stride_h + first * key_stride_t
    value_ptr += i_b * value_stride_b + i_h * value_stride_h + first * value_stride_t
    forget_ptr += i_b * forget_stride_b + i_h * forget_stride_h + first * forget_stride_t
    start_ptr += i_b * start_stride_b + first * start_stride_t
    states_ptr += (i_bh * num_chunks + i_chunk) * WIDTH * WIDTH
    output_ptr += ((i_b * num_tokens + first) * num_heads + i_h) * WIDTH

    logit, is_start = load_forgetting(
        forget_ptr, forget_stride_t, start_ptr, start_stride_t, rows, is_token, HAS_STARTS
    )
    query = load_tile(query_ptr, query_stride_t, rows, channels, is_token)
    key = load_tile(key_ptr, key_stride_t, rows, channels, is_token)
    state = tl.load(states_ptr + channels[:, None] * WIDTH + columns[None, :])
    value = load_tile(value_ptr, value_stride_t, rows, columns, is_token)
    coarse, fine, _, _ = chunk_decay(logit, is_start, is_token, HAS_STARTS)
    between = decay_between(coarse, fine, rows[:, None] >= rows[None, :])
    query = normalized_silu(query, eps)
    key = normalized_silu(key, eps)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * between
    output = tl.exp2(coarse + fine)[:, None] * tl.dot(query, state, input_precision="ieee")
    output = tl.dot(scores.to(key.dtype), value, output, input_precision="ieee")
    tl.store(
        output_ptr + rows[:, None] * num_heads * WIDTH + columns[None, :],
        output.to(output_ptr.dtype.element_ty),
        mask=is_token[:, None],
    )
