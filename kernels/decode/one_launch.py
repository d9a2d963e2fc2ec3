"""The decoder's training pass in one persistent launch, whatever the number of tokens.

Chunks of rows as in `kernels.decode.fused`, but all phases of all chunks are in one cooperative launch, one program a
multiprocessor: logits; loss and gradient of rows, in place; then the two products that carry the gradient on, their
tiles handed out by a counter, longest first. A barrier of the grid separates the phases. Matrices are read through
tensor descriptors, which leave the registers to the sums.

A tile of the hidden gradient sums over the whole vocabulary. Where there are few rows, and so few of those tiles, one
of them would outlast everything else: its sum is then cut into slices that are tiles of their own, and a last phase
adds them up.

Tiles and slices are computed whole by one program each, in an order of additions that does not depend on which:
results are the same bits every time.
"""

import kernels.launch  # noqa: F401, I001  before triton: it chooses the interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.decode.rows import row_loss_and_gradient
from kernels.launch import INTERPRETED

_TILE = (128, 256, 64)  # rows, columns and depth of a product's tile; fills 147 KB of shared memory at three stages
_INTERPRETED_TILE = (16, 32, 16)
_LOGITS_PER_LOAD = 4096
_ROW_STAGES = 2
_WARPS = 8
_STAGES = 3


@triton.jit
def _order_proxies(THREADS: tl.constexpr):
    """Make ordinary stores visible to tensor descriptors' loads, which take another way to memory."""
    tl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, $1;",
        "=r,r",
        [tl.arange(0, THREADS)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _grid_barrier(counter_ptr, num_rounds, THREADS: tl.constexpr, SINGLE: tl.constexpr):
    """Wait until all programs have come here for the `num_rounds`-th time."""
    if not SINGLE:
        _order_proxies(THREADS)
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        target = tl.num_programs(0) * num_rounds
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
            pass
        tl.debug_barrier()
        _order_proxies(THREADS)


@triton.jit
def _logits_tile(hidden, weight, logits_ptr, first, num_rows, m, n, D, PITCH, BM, BN, BK):
    b_acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        b_hidden = hidden.load([first + m * BM, k])
        b_weight = weight.load([n * BN, k])
        b_acc = tl.dot(b_hidden, tl.trans(b_weight), b_acc, input_precision="ieee")
    # Rows after the last token are zero, as the descriptor reads them; they must not keep an earlier chunk's values.
    o_m, o_n = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    p_logits = logits_ptr + o_m.to(tl.int64)[:, None] * PITCH + o_n[None, :]
    mask = (o_m < num_rows)[:, None] & (o_n < PITCH)[None, :]
    tl.store(p_logits, b_acc.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_hidden_tile(logits, weight, grad_ptr, first, last, m, n, begin, end, D, BM, BN, BK):
    """The sum over logits from `begin` to `end`, into rows `first` to `last` of what `grad_ptr` points at."""
    b_acc = tl.zeros((BM, BN), tl.float32)
    for k in range(begin, end, BK):
        b_grad = logits.load([m * BM, k])
        b_weight = weight.load([k, n * BN])
        b_acc = tl.dot(b_grad, b_weight, b_acc, input_precision="ieee")
    o_m, o_n = first + m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    p_grad = grad_ptr + o_m.to(tl.int64)[:, None] * D + o_n[None, :]
    tl.store(p_grad, b_acc.to(grad_ptr.dtype.element_ty), mask=(o_m < last)[:, None] & (o_n < D)[None, :])


@triton.jit
def _add_slices(partial_ptr, grad_ptr, num_numbers, slice_numbers, num_slices, BLOCK):
    """Sum of the slices `[num_slices, slice_numbers]`, first to last, into `num_numbers` of the gradient."""
    for begin in range(tl.program_id(0) * BLOCK, num_numbers, tl.num_programs(0) * BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = offsets < num_numbers
        b_sum = tl.zeros((BLOCK,), tl.float32)
        p_partial = partial_ptr + offsets
        for _ in range(num_slices):
            b_sum += tl.load(p_partial, mask=mask, other=0.0, cache_modifier=".cg")
            p_partial += slice_numbers
        tl.store(grad_ptr + offsets, b_sum.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_to(grad_ptr, b_grad, first, row, column, D, V, BM, BN):
    o_m, o_n = row + tl.arange(0, BM), column + tl.arange(0, BN)
    p_grad = grad_ptr + o_m.to(tl.int64)[:, None] * D + o_n[None, :]
    mask = (o_m < V)[:, None] & (o_n < D)[None, :]
    if first > 0:
        b_grad += tl.load(p_grad, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(p_grad, b_grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_weight_tile(logits, hidden, grad_ptr, first, num_rows, m, n, D, V, BM, BN, BK):
    b_acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, num_rows, BK):
        b_grad = logits.load([k, m * BM])
        b_hidden = hidden.load([first + k, n * BN])
        b_acc = tl.dot(tl.trans(b_grad), b_hidden, b_acc, input_precision="ieee")
    # Half of the columns at a time: the sum so far and the new one do not fit into the registers together.
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_acc, (BM, 2, BN // 2)), (0, 2, 1)))
    _add_to(grad_ptr, b_left, first, m * BM, n * BN, D, V, BM, BN // 2)
    _add_to(grad_ptr, b_right, first, m * BM, n * BN + BN // 2, D, V, BM, BN // 2)


@triton.jit
def decode_one_launch_kernel(
    hidden_by_row,  # [N, D], tiles [BM, BK]
    hidden_by_depth,  # [N, D], tiles [BK, BN]
    weight_by_row,  # [V, D], tiles [BN, BK]
    weight_by_depth,  # [V, D], tiles [BK, BN]
    logits_by_row,  # [chunk, PITCH], tiles [BM, BK]
    logits_by_depth,  # [chunk, PITCH], tiles [BK, BM]
    logits_ptr,
    target_ptr,  # [N] int64
    num_targets_ptr,  # [] int64
    loss_ptr,  # [N] float32
    correct_ptr,  # [N] int32
    grad_hidden_ptr,  # [N, D]
    grad_weight_ptr,  # [V, D]
    partial_ptr,  # [slices, chunk, D] float32, or None if the hidden gradient's tiles are whole
    counter_ptr,  # [1 + chunks] int32, zero
    num_tokens,
    chunk_rows,  # a multiple of BM and BK
    slice_depth,  # logits a slice of the hidden gradient sums over, a multiple of BK
    ignore_index,
    D: tl.constexpr,
    V: tl.constexpr,
    PITCH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    SINGLE: tl.constexpr,
):
    num_rounds = 0
    for first in range(0, num_tokens, chunk_rows):
        last = tl.minimum(first + chunk_rows, num_tokens)
        tiles_m = tl.cdiv(last - first, BM)
        for tile in range(tl.program_id(0), tiles_m * tl.cdiv(V, BN), tl.num_programs(0)):
            _logits_tile(
                hidden_by_row, weight_by_row, logits_ptr, first, tiles_m * BM, tile % tiles_m, tile // tiles_m,
                D, PITCH, BM, BN, BK,
            )  # fmt: skip
        num_rounds += 1
        _grid_barrier(counter_ptr, num_rounds, THREADS, SINGLE)

        for row in range(first + tl.program_id(0), last, tl.num_programs(0)):
            row_loss_and_gradient(
                logits_ptr + (row - first) * PITCH, tl.load(target_ptr + row), ignore_index,
                num_targets_ptr, loss_ptr + row, correct_ptr + row, V, PITCH, True, BLOCK, ROW_STAGES,
            )  # fmt: skip
        num_rounds += 1
        _grid_barrier(counter_ptr, num_rounds, THREADS, SINGLE)

        tiles_n = tl.cdiv(D, BN)
        num_hidden = tiles_m * tiles_n
        if partial_ptr is not None:
            num_slices = tl.cdiv(PITCH, slice_depth)
            num_hidden *= num_slices
        num_tiles = num_hidden + tl.cdiv(V, BM) * tiles_n
        next_tile_ptr = counter_ptr + 1 + first // chunk_rows
        tile = tl.atomic_add(next_tile_ptr, 1)
        while tile < num_tiles:
            if tile < num_hidden:
                m = tile % tiles_m
                if partial_ptr is None:
                    _grad_hidden_tile(
                        logits_by_row, weight_by_depth, grad_hidden_ptr, first, last, m, tile // tiles_m,
                        0, PITCH, D, BM, BN, BK,
                    )  # fmt: skip
                else:
                    # Slices of one depth come together: they read the same rows of the weight.
                    n, i_slice = tile // tiles_m % tiles_n, tile // (tiles_m * tiles_n)
                    begin = i_slice * slice_depth
                    _grad_hidden_tile(
                        logits_by_row, weight_by_depth, partial_ptr + i_slice.to(tl.int64) * chunk_rows * D,
                        0, chunk_rows, m, n, begin, tl.minimum(begin + slice_depth, PITCH), D, BM, BN, BK,
                    )  # fmt: skip
            else:
                tile -= num_hidden
                _grad_weight_tile(
                    logits_by_depth, hidden_by_depth, grad_weight_ptr, first, last - first, tile // tiles_n,
                    tile % tiles_n, D, V, BM, BN, BK,
                )  # fmt: skip
            tile = tl.atomic_add(next_tile_ptr, 1)
        num_rounds += 1
        _grid_barrier(counter_ptr, num_rounds, THREADS, SINGLE)

        if partial_ptr is not None:
            p_grad = grad_hidden_ptr + tl.full((), first, tl.int64) * D
            _add_slices(partial_ptr, p_grad, (last - first) * D, chunk_rows * D, num_slices, BLOCK)


def count_slices(num_rows: int, width: int, pitch: int, num_programs: int, most_bytes: int) -> int:
    """Into how many slices the sums of the hidden gradient are cut for a chunk of `num_rows`.

    As few as make a slice no longer than a program's share of both products, in steps of a tile's depth; fewer if they
    would take more than `most_bytes`. 1 leaves tiles whole.
    """
    block_m, block_n, block_k = _TILE
    tiles_m, tiles_n, depth = -(-num_rows // block_m), -(-width // block_n), pitch // block_k
    hidden_steps = tiles_m * tiles_n * depth
    weight_steps = -(-pitch // block_m) * tiles_n * -(-num_rows // block_k)
    share = max((hidden_steps + weight_steps) // num_programs, 1)
    fitting = most_bytes // (tiles_m * block_m * width * 4)
    return max(min(-(-depth // share), fitting), 1)


def launch_whole(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    num_targets: Tensor,
    buffer: Tensor,
    counters: Tensor,
    loss_rows: Tensor,
    correct_rows: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    *,
    ignore_index: int,
    spare_bytes: int,
) -> None:
    """All chunks of rows: losses, hits and both gradients, into the tensors given.

    Arguments:
        hidden, weight: contiguous, of one type, D a multiple of 16 bytes.
        buffer: `[rows of a chunk, pitch]` for logits, rows a multiple of 128.
        counters: `[1 + chunks]` int32, zero.
        spare_bytes: what is left of the working memory, for slices of the hidden gradient.
    """
    num_tokens, width = hidden.shape
    block_m, block_n, block_k = _INTERPRETED_TILE if INTERPRETED else _TILE
    num_programs = 1 if INTERPRETED else torch.cuda.get_device_properties(hidden.device).multi_processor_count
    chunk_rows, pitch = buffer.shape
    num_slices = count_slices(min(chunk_rows, num_tokens), width, pitch, num_programs, spare_bytes)
    slice_depth = triton.cdiv(triton.cdiv(pitch, block_k), num_slices) * block_k
    partial = None
    if num_slices > 1:
        shape = (triton.cdiv(pitch, slice_depth), chunk_rows, width)
        partial = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    decode_one_launch_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(hidden, [block_m, block_k]),
        TensorDescriptor.from_tensor(hidden, [block_k, block_n]),
        TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        TensorDescriptor.from_tensor(weight, [block_k, block_n]),
        TensorDescriptor.from_tensor(buffer, [block_m, block_k]),
        TensorDescriptor.from_tensor(buffer, [block_k, block_m]),
        buffer,
        target_ids,
        num_targets,
        loss_rows,
        correct_rows,
        grad_hidden,
        grad_weight,
        partial,
        counters,
        num_tokens,
        chunk_rows,
        slice_depth,
        ignore_index,
        D=width,
        V=weight.shape[0],
        PITCH=pitch,
        BM=block_m,
        BN=block_n,
        BK=block_k,
        BLOCK=min(_LOGITS_PER_LOAD, triton.next_power_of_2(pitch)),
        ROW_STAGES=_ROW_STAGES,
        THREADS=_WARPS * 32,
        SINGLE=INTERPRETED,
        num_warps=_WARPS,
        num_stages=_STAGES,
        launch_cooperative_grid=not INTERPRETED,
    )
