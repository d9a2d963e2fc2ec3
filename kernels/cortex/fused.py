"""Cortex on a GPU: the scan over a whole sequence in one Triton launch forward, three backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels.launch  # noqa: F401  first: it chooses the interpreter
from kernels.cortex.parameter_gradient import ROWS_FINISHED, finish_kernel, slice_kernel
from kernels.cortex.reference import CortexOutput, CortexState
from kernels.cortex.scan import cortex_backward_kernel, cortex_forward_kernel
from kernels.cortex.spike import GRADED_CEILING, SPIKES
from kernels.launch import INTERPRETED, check_launchable

COLUMN_WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LANES_PER_TILE = 8


class ScanConfig(NamedTuple):
    num_warps: int
    maxnreg: int | None  # registers a thread; left to itself the compiler spills some to fit more programs


class SliceConfig(NamedTuple):
    rows: int  # tokens of a lane a product takes at once
    num_warps: int


# By half-precision storage and neurons a column. In half precision a warp of the scan has 16 neurons, so that what it
# reads from memory is what it works on; float32 products have no tensor cores and need more threads.
SCAN_CONFIGS = {
    (True, 16): ScanConfig(1, 128),
    (True, 32): ScanConfig(2, 128),
    (True, 64): ScanConfig(4, 128),
    (True, 128): ScanConfig(8, 128),
    (False, 16): ScanConfig(1, None),
    (False, 32): ScanConfig(4, None),
    (False, 64): ScanConfig(8, None),
    (False, 128): ScanConfig(16, None),
}
SLICE_CONFIGS = {
    (True, 16): SliceConfig(64, 1),
    (True, 32): SliceConfig(64, 2),
    (True, 64): SliceConfig(64, 4),
    (True, 128): SliceConfig(64, 8),
    (False, 16): SliceConfig(32, 1),
    (False, 32): SliceConfig(32, 2),
    (False, 64): SliceConfig(32, 8),
    (False, 128): SliceConfig(32, 8),
}
MIN_ROWS_PER_SLICE = 256


def reloads_weights(is_half: bool, column_width: int) -> bool:
    """Whether a program of the scan has too few registers to hold its column's lateral weights."""
    return not is_half and column_width == 128


def cortex_fused(
    drive: Tensor,
    lateral_weight: Tensor,
    decay: Tensor,
    state: CortexState,
    document_start: Tensor | None = None,
    *,
    spike_kind: str = "graded",
    threshold: float = 0.5,
    adaptation_strength: float = 0.5,
    adaptation_decay: float = 0.95,
) -> CortexOutput:
    """`cortex_reference` in one launch: float32, bfloat16 or float16 spikes, float32 state.

    Matrix products add up in float32. Their operands are the drive's type, but float16 in a bfloat16 forward pass.

    Arguments: those of `cortex_reference`, on a CUDA GPU or in Triton's interpreter, with 16, 32, 64 or 128 neurons a
    column. The drive may be a view, such as half of a projection's output; it is kept for backward.

    Raises:
        ValueError: a device, type, shape or spike that the kernels do not take.
    """
    check_arguments(drive, lateral_weight, decay, state, document_start, spike_kind)
    differentiable = (drive, lateral_weight, decay, *state)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    spikes, voltage, adaptation, last_spikes, counts, _ = cortex_forward(
        drive if drive.stride(-1) == 1 else drive.contiguous(),
        lateral_weight.contiguous(),
        decay.contiguous(),
        *(tensor.contiguous() for tensor in state),
        document_start,
        GRADED_CEILING if spike_kind == "graded" else 0.0,
        threshold,
        adaptation_strength,
        adaptation_decay,
        save,
    )
    num_fired, num_saturated = counts.unbind()
    return CortexOutput(spikes, CortexState(voltage, adaptation, last_spikes), num_fired, num_saturated)


def check_arguments(
    drive: Tensor,
    lateral_weight: Tensor,
    decay: Tensor,
    state: CortexState,
    document_start: Tensor | None,
    spike_kind: str,
) -> None:
    """Raise ValueError for arguments the kernels would misread."""
    check_launchable("cortex", drive, lateral_weight, decay, *state, document_start)
    if spike_kind not in SPIKES:
        raise ValueError(f"spike is {spike_kind!r}; choose one of {', '.join(SPIKES)}")
    if drive.dtype not in DTYPES:
        raise ValueError(f"cortex: the drive is {drive.dtype}; fused kernels take {', '.join(map(str, DTYPES))}")
    num_lanes, num_tokens, width = drive.shape
    num_columns, column_width, _ = lateral_weight.shape
    if column_width not in COLUMN_WIDTHS:
        raise ValueError(f"cortex: a column has {column_width} neurons; fused kernels take {COLUMN_WIDTHS}")
    shapes = {
        "lateral_weight": (lateral_weight, (num_columns, column_width, column_width)),
        "decay": (decay, (num_columns * column_width,)),
        "drive": (drive, (num_lanes, num_tokens, num_columns * column_width)),
        **{name: (tensor, (num_lanes, width)) for name, tensor in state._asdict().items()},
    }
    if document_start is not None:
        shapes["document_start"] = (document_start, (num_lanes, num_tokens))
        if document_start.dtype != torch.bool:
            raise ValueError(f"cortex: document_start is {document_start.dtype}; it must be torch.bool")
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"cortex: {name} is {tuple(tensor.shape)} where the other arguments need {shape}")
    for name, tensor in {"decay": decay, **state._asdict()}.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"cortex: {name} is {tensor.dtype}; fused kernels need torch.float32")


def _ceil_div(n: int, divisor: int) -> int:
    return -(-n // divisor)


def _starts(document_start: Tensor | None, unused: Tensor) -> tuple[Tensor, int, int]:
    """The document starts as bytes, and their strides; where there are none, any tensor, which is never read."""
    if document_start is None:
        return unused, 0, 0
    return document_start.view(torch.uint8), document_start.stride(0), document_start.stride(1)


def _constants(
    drive: Tensor,
    lateral_weight: Tensor,
    document_start: Tensor | None,
    ceiling: float,
    threshold: float,
    adaptation_strength: float,
    adaptation_decay: float,
) -> dict[str, Any]:
    column_width = lateral_weight.shape[1]
    is_half = drive.dtype != torch.float32
    return {
        "C": column_width,
        "L": LANES_PER_TILE,
        "CEILING": ceiling,
        "THRESHOLD": threshold,
        "ADAPTATION_STRENGTH": adaptation_strength,
        "ADAPTATION_DECAY": adaptation_decay,
        "HAS_START": document_start is not None,
        "RELOAD": reloads_weights(is_half, column_width),
        **SCAN_CONFIGS[is_half, column_width]._asdict(),
    }


@torch.library.custom_op("neurogen::cortex_forward", mutates_args=())
def cortex_forward(
    drive: Tensor,
    lateral_weight: Tensor,
    decay: Tensor,
    initial_voltage: Tensor,
    initial_adaptation: Tensor,
    initial_spikes: Tensor,
    document_start: Tensor | None,
    ceiling: float,
    threshold: float,
    adaptation_strength: float,
    adaptation_decay: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Spikes `[B, T, D]`; voltage, adaptation and spikes after the last token, each `[B, D]` float32; how often each
    neuron fired and was saturated, `[2, D]` int32; and, if `save`, u of every token in the drive's type, `[B, T, D]`,
    from which backward has everything: its derivative, the spikes, and with them the voltage."""
    num_lanes, num_tokens, width = drive.shape
    num_columns = lateral_weight.shape[0]
    num_tiles = _ceil_div(num_lanes, LANES_PER_TILE)
    spikes = torch.empty(drive.shape, dtype=drive.dtype, device=drive.device)
    excess = torch.empty(drive.shape if save else (0,), dtype=drive.dtype, device=drive.device)
    voltage, adaptation, last_spikes = (torch.empty_like(initial_voltage) for _ in range(3))
    counts = torch.empty((num_tiles, 2, width), dtype=torch.int32, device=drive.device)
    if num_lanes > 0:
        start, *start_strides = _starts(document_start, drive)
        cortex_forward_kernel[(num_columns, num_tiles)](
            drive,
            lateral_weight,
            decay,
            initial_voltage,
            initial_adaptation,
            initial_spikes,
            start,
            spikes,
            excess,
            voltage,
            adaptation,
            last_spikes,
            counts,
            num_tokens,
            num_lanes,
            width,
            drive.stride(0),
            drive.stride(1),
            *start_strides,
            SAVE=save,
            **_constants(
                drive, lateral_weight, document_start, ceiling, threshold, adaptation_strength, adaptation_decay
            ),
        )
    return spikes, voltage, adaptation, last_spikes, counts.sum(0, dtype=torch.int32), excess


@cortex_forward.register_fake
def _(
    drive: Tensor,
    lateral_weight: Tensor,
    decay: Tensor,
    initial_voltage: Tensor,
    initial_adaptation: Tensor,
    initial_spikes: Tensor,
    document_start: Tensor | None,
    ceiling: float,
    threshold: float,
    adaptation_strength: float,
    adaptation_decay: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    voltage, adaptation, last_spikes = (torch.empty_like(initial_voltage) for _ in range(3))
    counts = drive.new_empty((2, drive.shape[2]), dtype=torch.int32)
    excess = drive.new_empty(drive.shape if save else (0,))
    return drive.new_empty(drive.shape), voltage, adaptation, last_spikes, counts, excess


@torch.library.custom_op("neurogen::cortex_backward", mutates_args=())
def cortex_backward(
    grad_spikes: Tensor,
    grad_voltage: Tensor,
    grad_adaptation: Tensor,
    grad_last_spikes: Tensor,
    drive: Tensor,
    lateral_weight: Tensor,
    decay: Tensor,
    initial_voltage: Tensor,
    initial_adaptation: Tensor,
    initial_spikes: Tensor,
    document_start: Tensor | None,
    spikes: Tensor,
    excess: Tensor,
    ceiling: float,
    threshold: float,
    adaptation_strength: float,
    adaptation_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to the drive, the lateral weights, the decay and the initial state, from those to the spikes and to
    the final state."""
    num_lanes, num_tokens, width = drive.shape
    num_columns, column_width, _ = lateral_weight.shape
    grad_drive = torch.empty(drive.shape, dtype=drive.dtype, device=drive.device)
    if num_lanes == 0 or num_tokens == 0:
        d_voltage, d_adaptation, d_spikes = (x.clone() for x in (grad_voltage, grad_adaptation, grad_last_spikes))
        return grad_drive, torch.zeros_like(lateral_weight), torch.zeros_like(decay), d_voltage, d_adaptation, d_spikes

    num_tiles = _ceil_div(num_lanes, LANES_PER_TILE)
    start, *start_strides = _starts(document_start, drive)
    constants = _constants(
        drive, lateral_weight, document_start, ceiling, threshold, adaptation_strength, adaptation_decay
    )
    d_voltage, d_adaptation, d_spikes = (torch.empty_like(initial_voltage) for _ in range(3))
    leak_sums = torch.empty((num_tiles, width), device=drive.device)
    cortex_backward_kernel[(num_columns, num_tiles)](
        grad_spikes,
        excess,
        lateral_weight,
        decay,
        initial_voltage,
        initial_adaptation,
        initial_spikes,
        start,
        grad_voltage,
        grad_adaptation,
        grad_last_spikes,
        grad_drive,
        d_voltage,
        d_adaptation,
        d_spikes,
        leak_sums,
        num_tokens,
        num_lanes,
        width,
        grad_spikes.stride(0),
        grad_spikes.stride(1),
        *start_strides,
        **constants,
    )

    config = SLICE_CONFIGS[drive.dtype != torch.float32, column_width]
    rows_per_slice = _rows_per_slice(drive, num_columns, config.rows)
    num_slices = _ceil_div(num_lanes * num_tokens, rows_per_slice) + 1
    lateral_sums = torch.empty((num_slices, *lateral_weight.shape), device=drive.device)
    drive_sums = torch.empty((num_slices, width), device=drive.device)
    slice_kernel[(num_columns, num_slices)](
        grad_drive,
        spikes,
        initial_spikes,
        start,
        drive,
        lateral_sums,
        drive_sums,
        num_tokens,
        num_lanes,
        width,
        drive.stride(0),
        drive.stride(1),
        *start_strides,
        rows_per_slice,
        C=column_width,
        ROWS=config.rows,
        HAS_START=document_start is not None,
        num_warps=config.num_warps,
    )
    grad_lateral_weight = torch.empty_like(lateral_weight)
    grad_decay = torch.empty_like(decay)
    finish_kernel[(width // ROWS_FINISHED.value,)](
        lateral_sums,
        drive_sums,
        leak_sums,
        lateral_weight,
        decay,
        grad_lateral_weight,
        grad_decay,
        width,
        num_slices,
        num_tiles,
        C=column_width,
        num_warps=4,
    )
    return grad_drive, grad_lateral_weight, grad_decay, d_voltage, d_adaptation, d_spikes


def _rows_per_slice(drive: Tensor, num_columns: int, rows: int) -> int:
    """Enough slices to give every multiprocessor a program, none smaller than MIN_ROWS_PER_SLICE."""
    num_rows = drive.shape[0] * drive.shape[1]
    num_processors = 2 if INTERPRETED else torch.cuda.get_device_properties(drive.device).multi_processor_count
    num_slices = max(1, num_processors // num_columns)
    return _ceil_div(max(_ceil_div(num_rows, num_slices), MIN_ROWS_PER_SLICE), rows) * rows


@cortex_backward.register_fake
def _(
    grad_spikes: Tensor,
    grad_voltage: Tensor,
    grad_adaptation: Tensor,
    grad_last_spikes: Tensor,
    drive: Tensor,
    lateral_weight: Tensor,
    decay: Tensor,
    initial_voltage: Tensor,
    initial_adaptation: Tensor,
    initial_spikes: Tensor,
    document_start: Tensor | None,
    spikes: Tensor,
    excess: Tensor,
    ceiling: float,
    threshold: float,
    adaptation_strength: float,
    adaptation_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_voltage, d_adaptation, d_spikes = (torch.empty_like(initial_voltage) for _ in range(3))
    grad_drive = drive.new_empty(drive.shape)
    return grad_drive, torch.empty_like(lateral_weight), torch.empty_like(decay), d_voltage, d_adaptation, d_spikes


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ceiling, threshold, adaptation_strength, adaptation_decay, save = inputs
    spikes, _, _, _, counts, excess = output
    ctx.mark_non_differentiable(counts, excess)
    ctx.save_for_backward(*tensors, spikes, excess)
    ctx.constants = (ceiling, threshold, adaptation_strength, adaptation_decay)
    assert save, "a graph needs what backward reads"


def _backward(
    ctx: Any, grad_spikes: Tensor, grad_voltage: Tensor, grad_adaptation: Tensor, grad_last_spikes: Tensor, *_: Any
) -> tuple[Tensor | None, ...]:
    if grad_spikes.stride(-1) != 1:
        grad_spikes = grad_spikes.contiguous()
    grad_state = [grad.contiguous() for grad in (grad_voltage, grad_adaptation, grad_last_spikes)]
    grads = cortex_backward(grad_spikes, *grad_state, *ctx.saved_tensors, *ctx.constants)
    return *grads, None, *(None,) * len(ctx.constants), None


cortex_forward.register_autograd(_backward, setup_context=_setup_context)
