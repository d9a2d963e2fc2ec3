"""Triton kernels that turn a backward scan's results into gradients of the lateral weights and the decay.

With gain_i = sqrt(1 - alpha_i), dI the drive's gradient, dv = dI / gain the membrane voltage's, and s', v' what a
token receives from the one before (zero at a document's start):

    dR_ij = (1 - alpha_i) sum dv_i s'_j = gain_i sum dI_i s'_j
    dalpha = sum dv (v' - theta s') - sum dv R s' - sum dv I / (2 gain)
           = leak_sum - sum_j R_ij dR_ij / (1 - alpha_i) - sum dI I / (2 (1 - alpha_i))

where sums run over lanes and tokens and the backward scan has computed leak_sum. A bias that was added to the drive
gets sum dI. The products over lanes and tokens are cut into slices, one program each, and the slices added in a fixed
order: no atomics, the same bits at every run.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton
import triton.language as tl

ROWS_FINISHED = tl.constexpr(16)  # rows of dR a program of `finish_kernel` writes


@triton.jit(do_not_specialize=("T", "B", "start_stride_b", "start_stride_t", "rows_per_slice"))
def slice_kernel(
    grad_drive,
    spikes,
    initial_spikes,
    document_start,
    drive,
    lateral_sums,
    drive_sums,
    T,
    B,
    D,
    drive_stride_b,
    drive_stride_t,
    grad_drive_stride_b,
    grad_drive_stride_t,
    start_stride_b,
    start_stride_t,
    rows_per_slice,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_START: tl.constexpr,
):
    """One slice of sum dI s'^T, `[C, C]`, and of sum dI I and sum dI, `[C]` each; a row is one token of one lane.

    The last slice (program index along axis 1) is for the tokens that receive the initial state: one row a lane.
    """
    i_slice = tl.program_id(1)
    first_neuron = tl.program_id(0).to(tl.int64) * C
    c = first_neuron + tl.arange(0, C)
    is_first_tokens = i_slice == tl.num_programs(1) - 1
    row = tl.where(is_first_tokens, 0, i_slice * rows_per_slice)
    end = tl.where(is_first_tokens, B, tl.minimum(row + rows_per_slice, B * T))
    lateral_sum = tl.zeros((C, C), tl.float32)
    drive_product = tl.zeros((ROWS, C), tl.float32)
    drive_total = tl.zeros((ROWS, C), tl.float32)
    while row < end:
        n = row + tl.arange(0, ROWS)
        exists = n < end
        lane = tl.where(is_first_tokens, n, n // T).to(tl.int64)
        t = tl.where(is_first_tokens, 0, n % T).to(tl.int64)
        receives = exists
        if HAS_START:
            start = tl.load(document_start + lane * start_stride_b + t * start_stride_t, mask=exists, other=1)
            receives = exists & (start == 0)
        token = ((lane * T + t) * D)[:, None] + c[None, :]
        dx_offset = (lane * grad_drive_stride_b + t * grad_drive_stride_t)[:, None] + c[None, :]
        dx = tl.load(grad_drive + dx_offset, mask=exists[:, None], other=0.0)
        s = tl.load(spikes + token - D, mask=(receives & (t > 0))[:, None], other=0.0)
        s_initial = tl.load(
            initial_spikes + (lane * D)[:, None] + c[None, :], mask=(receives & is_first_tokens)[:, None], other=0.0
        )
        s = tl.where(is_first_tokens, s_initial.to(s.dtype), s)
        x_offset = (lane * drive_stride_b + t * drive_stride_t)[:, None] + c[None, :]
        x = tl.load(drive + x_offset, mask=(exists & (not is_first_tokens))[:, None], other=0.0)
        drive_product += dx.to(tl.float32) * x.to(tl.float32)
        drive_total += dx.to(tl.float32)
        lateral_sum = tl.dot(tl.trans(dx), s, lateral_sum, input_precision="ieee")
        row += ROWS
    i = tl.arange(0, C)
    lateral_offset = i_slice.to(tl.int64) * D * C + first_neuron * C
    tl.store(lateral_sums + lateral_offset + i[:, None] * C + i[None, :], lateral_sum)
    drive_sums += i_slice.to(tl.int64) * 2 * D + c
    tl.store(drive_sums, tl.sum(drive_product, 0))
    # The first tokens are in a slice of their own a second time, for the state they receive.
    tl.store(drive_sums + D, tl.where(is_first_tokens, 0.0, tl.sum(drive_total, 0)))


@triton.jit(do_not_specialize=("num_slices", "num_tiles"))
def finish_kernel(
    lateral_sums,
    drive_sums,
    leak_sums,
    lateral_weight,
    decay,
    grad_lateral_weight,
    grad_decay,
    grad_bias,
    D,
    num_slices,
    num_tiles,
    C: tl.constexpr,
):
    """Add slices and tiles, and write ROWS_FINISHED rows of dR and as many elements of dalpha and of sum dI."""
    neuron = tl.program_id(0).to(tl.int64) * ROWS_FINISHED + tl.arange(0, ROWS_FINISHED)
    offset = neuron[:, None] * C + tl.arange(0, C)[None, :]
    alpha = tl.load(decay + neuron)
    lateral_sum = tl.zeros((ROWS_FINISHED, C), tl.float32)
    drive_sum = tl.zeros((ROWS_FINISHED,), tl.float32)
    bias_sum = tl.zeros((ROWS_FINISHED,), tl.float32)
    leak_sum = tl.zeros((ROWS_FINISHED,), tl.float32)
    i = 0
    while i < num_slices:
        lateral_sum += tl.load(lateral_sums + offset)
        drive_sum += tl.load(drive_sums + neuron)
        bias_sum += tl.load(drive_sums + D + neuron)
        lateral_sums += D.to(tl.int64) * C
        drive_sums += 2 * D
        i += 1
    i = 0
    while i < num_tiles:
        leak_sum += tl.load(leak_sums + neuron)
        leak_sums += D
        i += 1
    grad = lateral_sum * tl.sqrt(1.0 - alpha)[:, None]
    tl.store(grad_lateral_weight + offset, grad.to(grad_lateral_weight.dtype.element_ty))
    lateral_share = tl.sum(tl.load(lateral_weight + offset).to(tl.float32) * grad, 1)
    tl.store(grad_decay + neuron, leak_sum - (lateral_share + 0.5 * drive_sum) / (1.0 - alpha))
    tl.store(grad_bias + neuron, bias_sum)
