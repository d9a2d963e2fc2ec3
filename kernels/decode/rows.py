"""Triton kernels of the fused decoder: loss and gradient of rows of logits, and the late scaling of gradients."""

import kernels.launch  # noqa: F401, I001  before triton: it chooses the interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

PITCH_MULTIPLE = 64  # logits a row is padded to, so that every row starts on a 128-byte line
_LOGITS_PER_LOAD = 4096
_STAGES = 1  # loads of logits under way at a time; more cost registers and with them programs a multiprocessor
_SCALE_BLOCK = 4096
_SCALE_PROGRAMS = 1024


@triton.jit
def row_loss_and_gradient(
    logits_row,  # [PITCH]; becomes d(mean loss)/d(logits) if WRITE_GRADIENT
    target,
    ignore_index,
    num_targets_ptr,  # [] int64
    loss_ptr,  # [] float32
    correct_ptr,  # [] int32
    V: tl.constexpr,
    PITCH: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Loss and arg-max hit of one row of logits, 0 if its target is ignored."""
    offsets = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(loss_ptr, 0.0)
        tl.store(correct_ptr, 0)
        if WRITE_GRADIENT:
            zeros = tl.zeros((BLOCK,), logits_row.dtype.element_ty)
            for first in range(0, V, BLOCK):
                tl.store(logits_row + first + offsets, zeros, mask=first + offsets < PITCH)
    else:
        # Online softmax in every position of the block by itself; positions meet once, after the loop.
        b_max = tl.full((BLOCK,), -1e38, tl.float32)
        b_sum = tl.zeros((BLOCK,), tl.float32)
        b_arg = tl.zeros((BLOCK,), tl.int32)
        for first in tl.range(0, V, BLOCK, num_stages=STAGES):
            b_id = first + offsets
            # Loads reach into the padding, which is the same for all of a vector load; its values do not count. They go
            # past the first-level cache, since in a persistent launch other programs have written the row.
            b_logit = tl.load(logits_row + b_id, mask=b_id < PITCH, other=0.0, cache_modifier=".cg").to(tl.float32)
            b_logit = tl.where(b_id < V, b_logit, float("-inf"))
            b_larger = b_logit > b_max
            b_ratio = tl.exp(-tl.abs(b_logit - b_max))
            b_sum = tl.where(b_larger, b_sum * b_ratio + 1.0, b_sum + b_ratio)
            b_max = tl.where(b_larger, b_logit, b_max)
            b_arg = tl.where(b_larger, b_id, b_arg)
        largest = tl.max(b_max, axis=0)
        log_sum = tl.log(tl.sum(b_sum * tl.exp(b_max - largest), axis=0)) + largest
        predicted = tl.min(tl.where(b_max == largest, b_arg, V), axis=0)

        # A target outside the vocabulary cannot raise here; NaN in the loss and the gradient shows it.
        in_vocabulary = (target >= 0) & (target < V)
        target_logit = tl.load(logits_row + tl.where(in_vocabulary, target, 0), cache_modifier=".cg").to(tl.float32)
        tl.store(loss_ptr, tl.where(in_vocabulary, log_sum - target_logit, float("nan")))
        tl.store(correct_ptr, (predicted == target).to(tl.int32))
        if WRITE_GRADIENT:
            # No thread may overwrite the target's logit before all have read it.
            tl.debug_barrier()
            scale = 1.0 / tl.load(num_targets_ptr).to(tl.float32)
            scale = tl.where(in_vocabulary, scale, float("nan"))
            for first in tl.range(0, V, BLOCK, num_stages=STAGES):
                b_id = first + offsets
                b_logit = tl.load(logits_row + b_id, mask=b_id < PITCH, other=0.0, cache_modifier=".cg").to(tl.float32)
                b_probability = tl.exp(tl.where(b_id < V, b_logit, float("-inf")) - log_sum)
                b_grad = scale * (b_probability - tl.where(b_id == target, 1.0, 0.0))
                tl.store(logits_row + b_id, b_grad.to(logits_row.dtype.element_ty), mask=b_id < PITCH)


@triton.jit
def decode_rows_kernel(
    logits_ptr,  # [rows, PITCH]
    target_ptr,  # [rows] int64
    num_targets_ptr,
    loss_ptr,  # [rows]
    correct_ptr,  # [rows]
    ignore_index,
    V: tl.constexpr,
    PITCH: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_loss_and_gradient(
        logits_ptr + row * PITCH,
        tl.load(target_ptr + row),
        ignore_index,
        num_targets_ptr,
        loss_ptr + row,
        correct_ptr + row,
        V,
        PITCH,
        WRITE_GRADIENT,
        BLOCK,
        STAGES,
    )


def launch_rows(
    logits: Tensor,
    target_ids: Tensor,
    num_targets: Tensor,
    loss_rows: Tensor,
    correct_rows: Tensor,
    *,
    vocab_size: int,
    ignore_index: int,
    write_gradient: bool,
) -> None:
    """Loss (0 where ignored) and arg-max hit of every row of logits `[rows, pitch]`, pitch >= V; on request the logits
    are overwritten by the gradient of the sum of losses over `num_targets`."""
    block = min(_LOGITS_PER_LOAD, triton.next_power_of_2(logits.shape[1]))
    decode_rows_kernel[(logits.shape[0],)](
        logits,
        target_ids,
        num_targets,
        loss_rows,
        correct_rows,
        ignore_index,
        V=vocab_size,
        PITCH=logits.shape[1],
        WRITE_GRADIENT=write_gradient,
        BLOCK=block,
        STAGES=_STAGES,
        num_warps=max(block // 512, 1),
    )


@triton.jit
def scale_kernel(x_ptr, scale_ptr, num_elements, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    scale = tl.load(scale_ptr).to(tl.float32)
    # The usual case, loss.backward(), costs a launch and no pass over memory.
    if scale != 1.0:
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, num_elements, PROGRAMS * BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            b_x = tl.load(x_ptr + offsets, mask=offsets < num_elements).to(tl.float32) * scale
            tl.store(x_ptr + offsets, b_x.to(x_ptr.dtype.element_ty), mask=offsets < num_elements)


@torch.library.custom_op("neurogen::scale_", mutates_args=("x",))
def scale_(x: Tensor, scale: Tensor) -> None:
    """x *= scale, with x contiguous and scale a single number on the device, read there; free if it is 1."""
    if x.numel() == 0:
        return
    programs = min(triton.cdiv(x.numel(), _SCALE_BLOCK), _SCALE_PROGRAMS)
    scale_kernel[(programs,)](x, scale, x.numel(), BLOCK=_SCALE_BLOCK, PROGRAMS=programs, num_warps=8)


@scale_.register_fake
def _(x, scale):  # type: ignore[no-untyped-def]
    return None
