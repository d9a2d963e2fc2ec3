"""Cortex on a GPU: the scan over a whole sequence in one Triton launch forward, three backward."""

from typing import Any

import torch
from torch import Tensor

import kernels.launch  # noqa: F401  first: it chooses the interpreter
from kernels.cortex.launches import launch_backward, launch_forward
from kernels.cortex.reference import CortexOutput, CortexState
from kernels.cortex.spike import SPIKES
from kernels.launch import check_launchable

COLUMN_WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        spike_kind,
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


@torch.library.custom_op("neurogen::cortex_forward", mutates_args=())
def cortex_forward(
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
    """`launch_forward`."""
    return launch_forward(
        drive,
        lateral_weight,
        decay,
        initial_voltage,
        initial_adaptation,
        initial_spikes,
        document_start,
        spike_kind,
        threshold,
        adaptation_strength,
        adaptation_decay,
        save,
    )


@cortex_forward.register_fake
def _(
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
    spike_kind: str,
    threshold: float,
    adaptation_strength: float,
    adaptation_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to the drive, the lateral weights, the decay and the initial state, from those to the spikes and to
    the final state."""
    grad_drive = torch.empty(drive.shape, dtype=drive.dtype, device=drive.device)
    grad_lateral_weight, grad_decay, _, d_voltage, d_adaptation, d_spikes = launch_backward(
        grad_spikes,
        grad_voltage,
        grad_adaptation,
        grad_last_spikes,
        drive,
        lateral_weight,
        decay,
        initial_voltage,
        initial_adaptation,
        initial_spikes,
        document_start,
        spikes,
        excess,
        grad_drive,
        spike_kind,
        threshold,
        adaptation_strength,
        adaptation_decay,
    )
    return grad_drive, grad_lateral_weight, grad_decay, d_voltage, d_adaptation, d_spikes


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
    spike_kind: str,
    threshold: float,
    adaptation_strength: float,
    adaptation_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_voltage, d_adaptation, d_spikes = (torch.empty_like(initial_voltage) for _ in range(3))
    grad_drive = drive.new_empty(drive.shape)
    return grad_drive, torch.empty_like(lateral_weight), torch.empty_like(decay), d_voltage, d_adaptation, d_spikes


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, spike_kind, threshold, adaptation_strength, adaptation_decay, save = inputs
    spikes, _, _, _, counts, excess = output
    ctx.mark_non_differentiable(counts, excess)
    ctx.save_for_backward(*tensors, spikes, excess)
    ctx.constants = (spike_kind, threshold, adaptation_strength, adaptation_decay)
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
