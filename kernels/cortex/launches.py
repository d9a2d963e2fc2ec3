"""Launches of the cortex's Triton kernels: which block sizes, on what memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels.launch  # noqa: F401  first: it chooses the interpreter
from kernels.cortex.parameter_gradient import ROWS_FINISHED, finish_kernel, slice_kernel
from kernels.cortex.scan import cortex_backward_kernel, cortex_forward_kernel
from kernels.cortex.scan_one_lane import cortex_backward_one_lane_kernel, cortex_forward_one_lane_kernel
from kernels.launch import INTERPRETED

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
ONE_LANE_WIDTHS = (64, 128)  # neurons a column; a warp of `scan_one_lane` has 32 and a product takes no fewer than 16


def reloads_weights(is_half: bool, column_width: int) -> bool:
    """Whether a program of the scan has too few registers to hold its column's lateral weights."""
    return not is_half and column_width == 128


def runs_one_lane(drive: Tensor, num_columns: int) -> bool:
    """Whether a program of the scan runs one lane: where that gives no multiprocessor two programs.

    In float32 only in the interpreter: without tensor cores the products are long and not a chain.
    """
    num_lanes, _, width = drive.shape
    is_taken = drive.dtype != torch.float32 or INTERPRETED
    return is_taken and width // num_columns in ONE_LANE_WIDTHS and num_lanes * num_columns <= _num_processors(drive)


def _num_processors(drive: Tensor) -> int:
    return 2 if INTERPRETED else torch.cuda.get_device_properties(drive.device).multi_processor_count


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
    spike_kind: str,
    threshold: float,
    adaptation_strength: float,
    adaptation_decay: float,
) -> dict[str, Any]:
    num_columns, column_width, _ = lateral_weight.shape
    is_half = drive.dtype != torch.float32
    constants = {
        "C": column_width,
        "KIND": spike_kind,
        "THRESHOLD": threshold,
        "ADAPTATION_STRENGTH": adaptation_strength,
        "ADAPTATION_DECAY": adaptation_decay,
        "HAS_START": document_start is not None,
    }
    if runs_one_lane(drive, num_columns):
        return constants | {"num_warps": column_width // 32}
    return constants | {
        "L": LANES_PER_TILE,
        "RELOAD": reloads_weights(is_half, column_width),
        **SCAN_CONFIGS[is_half, column_width]._asdict(),
    }


def launch_forward(
    drive: Tensor,
    lateral_weight: Tensor,
    decay: Tensor,
    initial_voltage: Tensor,
    initial_adaptation: Tensor,
    initial_spikes: Tensor,
    document_start: Tensor | None,
    spike_kind: str,
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
    one_lane = runs_one_lane(drive, num_columns)
    num_tiles = num_lanes if one_lane else _ceil_div(num_lanes, LANES_PER_TILE)
    spikes = torch.empty(drive.shape, dtype=drive.dtype, device=drive.device)
    excess = torch.empty(drive.shape if save else (0,), dtype=drive.dtype, device=drive.device)
    voltage, adaptation, last_spikes = (torch.empty_like(initial_voltage) for _ in range(3))
    counts = torch.empty((num_tiles, 2, width), dtype=torch.int32, device=drive.device)
    if num_lanes > 0:
        start, *start_strides = _starts(document_start, drive)
        kernel = cortex_forward_one_lane_kernel if one_lane else cortex_forward_kernel
        kernel[(num_columns, num_tiles)](
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
                drive, lateral_weight, document_start, spike_kind, threshold, adaptation_strength, adaptation_decay
            ),
        )
    total = counts[0] if num_tiles == 1 else counts.sum(0, dtype=torch.int32)
    return spikes, voltage, adaptation, last_spikes, total, excess


def launch_backward(
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
    grad_drive: Tensor,
    spike_kind: str,
    threshold: float,
    adaptation_strength: float,
    adaptation_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients from those to the spikes and to the final state.

    That to the drive is written to `grad_drive`, `[B, T, D]` with a contiguous last dimension, which may be a part of
    wider rows. Returned are those to the lateral weights, the decay, a bias in the drive (`[D]` float32) and the
    initial state.
    """
    num_lanes, num_tokens, width = drive.shape
    num_columns, column_width, _ = lateral_weight.shape
    if num_lanes == 0 or num_tokens == 0:
        d_voltage, d_adaptation, d_spikes = (x.clone() for x in (grad_voltage, grad_adaptation, grad_last_spikes))
        nothing = torch.zeros_like(decay)
        return torch.zeros_like(lateral_weight), nothing, nothing.clone(), d_voltage, d_adaptation, d_spikes

    one_lane = runs_one_lane(drive, num_columns)
    num_tiles = num_lanes if one_lane else _ceil_div(num_lanes, LANES_PER_TILE)
    start, *start_strides = _starts(document_start, drive)
    constants = _constants(
        drive, lateral_weight, document_start, spike_kind, threshold, adaptation_strength, adaptation_decay
    )
    d_voltage, d_adaptation, d_spikes = (torch.empty_like(initial_voltage) for _ in range(3))
    leak_sums = torch.empty((num_tiles, width), device=drive.device)
    kernel = cortex_backward_one_lane_kernel if one_lane else cortex_backward_kernel
    kernel[(num_columns, num_tiles)](
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
        grad_drive.stride(0),
        grad_drive.stride(1),
        *start_strides,
        **constants,
    )

    config = SLICE_CONFIGS[drive.dtype != torch.float32, column_width]
    rows_per_slice = _rows_per_slice(drive, num_columns, config.rows)
    num_slices = _ceil_div(num_lanes * num_tokens, rows_per_slice) + 1
    lateral_sums = torch.empty((num_slices, *lateral_weight.shape), device=drive.device)
    drive_sums = torch.empty((num_slices, 2, width), device=drive.device)
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
        grad_drive.stride(0),
        grad_drive.stride(1),
        *start_strides,
        rows_per_slice,
        C=column_width,
        ROWS=config.rows,
        HAS_START=document_start is not None,
        num_warps=config.num_warps,
    )
    grad_lateral_weight = torch.empty_like(lateral_weight)
    grad_decay, grad_bias = torch.empty_like(decay), torch.empty_like(decay)
    finish_kernel[(width // ROWS_FINISHED.value,)](
        lateral_sums,
        drive_sums,
        leak_sums,
        lateral_weight,
        decay,
        grad_lateral_weight,
        grad_decay,
        grad_bias,
        width,
        num_slices,
        num_tiles,
        C=column_width,
        num_warps=4,
    )
    return grad_lateral_weight, grad_decay, grad_bias, d_voltage, d_adaptation, d_spikes


def _rows_per_slice(drive: Tensor, num_columns: int, rows: int) -> int:
    """Enough slices to give every multiprocessor a program, none smaller than MIN_ROWS_PER_SLICE."""
    num_rows = drive.shape[0] * drive.shape[1]
    num_slices = max(1, _num_processors(drive) // num_columns)
    return _ceil_div(max(_ceil_div(num_rows, num_slices), MIN_ROWS_PER_SLICE), rows) * rows
