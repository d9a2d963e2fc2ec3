"""Linear decoder, cross-entropy and arg-max without `[N, V]` logits, for N tokens.

The gradient of the mean loss is known up to its upstream factor as soon as the logits are, so loss and gradients are
made together and the logits are computed once: 6 N V D operations, where recomputing logits in the backward pass
would need 8. Rows are taken in chunks. For each, a product makes the logits, a pass over them replaces them by the
gradient, and two products carry that into hidden states and weight; the backward pass multiplies by the upstream
factor. At V = 50257, D = 1536 in bfloat16 a chunk of 2048 rows is 0.95 TFLOP of products against 0.6 GB of passes over
its logits, so the products decide.

A large vocabulary in bfloat16 on a Hopper GPU takes one launch for all of it (`kernels.decode.one_launch`); everything
else takes torch's products and one launch a chunk between them. A row of logits is padded to a multiple of 64, and so
are the rows of a rounded weight: products are slow when the rows of a matrix do not start on 16 bytes.
"""

import kernels.launch  # noqa: F401, I001  before triton: it chooses the interpreter
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decode.reference import IGNORE_INDEX, DecodeOutput
from kernels.decode.rows import PITCH_MULTIPLE, launch_rows, scale_
from kernels.decode.totals import count_targets, sum_rows
from kernels.launch import INTERPRETED, check_launchable
from kernels.linear import RoundedWeights, add_product, handed_over, stored_dtype

LOGITS_BYTES = 208 * 2**20  # most that a chunk's logits may take: 2048 rows at V = 50257 in bfloat16
WORKING_BYTES = 256 * 2**20  # and together with a copy of the weight rounded for this call alone
_CHUNK_MULTIPLE = 128
# Whether `kernels.decode.one_launch` is used: None where it is quicker, or a test's choice.
ONE_LAUNCH: bool | None = None
_WEIGHT_TILE = (128, 256)  # rows and columns of the weight's gradient that a program of it makes


def chunk_rows(num_rows: int, row_bytes: int, weight_copy_bytes: int = 0) -> int:
    """Rows of logits to work on at a time: as few equal chunks as the limits above allow."""
    fitting = min(LOGITS_BYTES, WORKING_BYTES - weight_copy_bytes) // row_bytes
    most = max(fitting // _CHUNK_MULTIPLE, 1) * _CHUNK_MULTIPLE
    num_chunks = -(-num_rows // most)
    return -(-num_rows // (num_chunks * _CHUNK_MULTIPLE)) * _CHUNK_MULTIPLE


def _pitch(vocab_size: int) -> int:
    """Length of a row of logits in memory."""
    return -(-vocab_size // PITCH_MULTIPLE) * PITCH_MULTIPLE


@torch.library.custom_op("neurogen::decode_forward", mutates_args=())
def decode_forward(
    hidden: Tensor,
    weight: Tensor,
    rounded: Tensor,
    target_ids: Tensor,
    ignore_index: int,
    hidden_needs_grad: bool,
    weight_needs_grad: bool,
    weight_copy_bytes: int,
    weight_grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, hits and number of targets, and the gradients of the loss `[N, D]` and `[V, D]` (empty unless needed).

    rounded: the weight in hidden's type, with V rows or as many as a row of logits is padded to, the rest zero.
    weight_copy_bytes: what it takes from the working memory.
    weight_grad_dtype: of the weight's gradient, to which each chunk's part is rounded.
    """
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    loss_rows = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    correct_rows = torch.empty(num_rows, dtype=torch.int32, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape if hidden_needs_grad else (0,), dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.empty(
        weight.shape if weight_needs_grad else (0,), dtype=weight_grad_dtype, device=hidden.device
    )
    if num_rows == 0:
        num_targets = correct_rows.sum()
        return loss_rows.sum(), num_targets.clone(), num_targets, grad_hidden, grad_weight.zero_()

    hidden, target_ids = hidden.contiguous(), target_ids.contiguous()
    pitch = _pitch(vocab_size)
    rows_at_a_time = chunk_rows(num_rows, pitch * hidden.element_size(), weight_copy_bytes)
    buffer = torch.empty(rows_at_a_time, pitch, dtype=hidden.dtype, device=hidden.device)
    counters = torch.empty(1 + -(-num_rows // rows_at_a_time), dtype=torch.int32, device=hidden.device)
    num_targets = count_targets(target_ids, ignore_index, zeroed=counters)
    if hidden_needs_grad and weight_needs_grad and _runs_in_one_launch(hidden, vocab_size):
        from kernels.decode.one_launch import launch_whole  # needs Triton 3.4

        launch_whole(
            hidden,
            rounded[:vocab_size].contiguous(),
            target_ids,
            num_targets,
            buffer,
            counters,
            loss_rows,
            correct_rows,
            grad_hidden,
            grad_weight,
            ignore_index=ignore_index,
            spare_bytes=WORKING_BYTES - weight_copy_bytes - buffer.nbytes,
        )
        return *sum_rows(loss_rows, correct_rows, num_targets), num_targets, grad_hidden, grad_weight
    for first in range(0, num_rows, rows_at_a_time):
        rows = slice(first, min(first + rows_at_a_time, num_rows))
        padded = buffer[: rows.stop - first]
        logits = padded[:, : rounded.shape[0]]
        torch.mm(hidden[rows], rounded.t(), out=logits)
        launch_rows(
            padded,
            target_ids[rows],
            num_targets,
            loss_rows[rows],
            correct_rows[rows],
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            write_gradient=hidden_needs_grad or weight_needs_grad,
        )
        if hidden_needs_grad:
            torch.mm(logits, rounded, out=grad_hidden[rows])
        if weight_needs_grad:
            add_product(grad_weight, padded[:, :vocab_size].t(), hidden[rows], is_first=first == 0)
    return *sum_rows(loss_rows, correct_rows, num_targets), num_targets, grad_hidden, grad_weight


def _runs_in_one_launch(hidden: Tensor, vocab_size: int) -> bool:
    width = hidden.shape[1]
    aligned = width * hidden.element_size() % 16 == 0
    if ONE_LAUNCH is not None and (INTERPRETED or not ONE_LAUNCH):
        return ONE_LAUNCH and aligned
    if INTERPRETED or hidden.dtype != torch.bfloat16:
        return False
    properties = torch.cuda.get_device_properties(hidden.device)
    # The weight's gradient has a program a tile, which sums over all rows: too few of them leave the GPU idle.
    num_tiles = -(-vocab_size // _WEIGHT_TILE[0]) * -(-width // _WEIGHT_TILE[1])
    fills = ONE_LAUNCH or num_tiles >= properties.multi_processor_count
    return aligned and properties.major == 9 and fills


@decode_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, rounded, target_ids, ignore_index, hidden_needs_grad, weight_needs_grad, weight_copy_bytes,
    weight_grad_dtype,
):  # fmt: skip
    return (
        hidden.new_empty((), dtype=torch.float32),
        target_ids.new_empty(()),
        target_ids.new_empty(()),
        hidden.new_empty(hidden.shape if hidden_needs_grad else (0,)),
        weight.new_empty(weight.shape if weight_needs_grad else (0,), dtype=weight_grad_dtype),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, _, num_targets, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(output[1], num_targets, grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)  # zeros the size of the weight, for results that have no gradient
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.hidden_needs_grad, ctx.weight_needs_grad = inputs[5], inputs[6]
    ctx.weight = inputs[1]


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    # In place: a second backward through the same loss is refused by autograd's version check, not scaled twice.
    grad_hidden, grad_weight = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 9
    if ctx.hidden_needs_grad:
        scale_(grad_hidden, grad_loss)
    if ctx.weight_needs_grad:
        scale_(grad_weight, grad_loss)
    return (
        grad_hidden if ctx.hidden_needs_grad else None,
        handed_over(ctx.weight, grad_weight) if ctx.weight_needs_grad else None,
        *(None,) * 7,
    )


decode_forward.register_autograd(_backward, setup_context=_setup_context)


def decode_fused(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    rounded: RoundedWeights | None = None,
) -> DecodeOutput:
    """`decode_reference` without logits of all tokens at a time; arguments and results as there.

    The gradients are made with the loss and handed out by the backward pass, so a loss can be differentiated once.
    Products are in hidden's type with float32 sums; a weight of another type is rounded to it, and its gradient is
    summed in its own. `rounded` keeps the rounded weight from one step to the next; without it, it is made anew and
    takes its part of the working memory. A bfloat16 weight's gradient is rounded once a chunk of rows: for many tokens
    keep the weight in float32. float32 products follow `torch.backends.cuda.matmul`, where TF32 is off by default.

    A target outside `[0, V)` other than `ignore_index`, which the reference rejects, makes loss and gradients NaN: a
    launch cannot raise without a synchronisation.

    Raises:
        ValueError: the tensors are not all on one device that fused kernels run on, or are float64.
    """
    check_launchable("decode", hidden, weight, target_ids)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    recorded = torch.is_grad_enabled()
    copy_bytes = 0
    if weight.dtype == hidden.dtype:
        weight_copy = weight.detach()
    elif rounded is not None:
        weight_copy = rounded.get([weight], hidden.dtype, rows_multiple=PITCH_MULTIPLE)
    else:
        weight_copy = F.pad(weight.detach().to(hidden.dtype), (0, 0, 0, -weight.shape[0] % PITCH_MULTIPLE))
        copy_bytes = weight_copy.numel() * weight_copy.element_size()
    rows = hidden.reshape(-1, hidden.shape[-1])
    row_bytes = _pitch(weight.shape[0]) * hidden.element_size()
    is_one_chunk = len(rows) > 0 and chunk_rows(len(rows), row_bytes, copy_bytes) >= len(rows)
    loss, num_correct, num_targets, _, _ = decode_forward(
        rows,
        weight,
        weight_copy,
        target_ids.reshape(-1),
        ignore_index,
        recorded and hidden.requires_grad,
        recorded and weight.requires_grad,
        copy_bytes,
        stored_dtype(weight, rows) if is_one_chunk else weight.dtype,
    )
    return DecodeOutput(loss, num_correct, num_targets)
