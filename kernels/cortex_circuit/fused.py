"""A spiking layer's circuit: two cuBLAS products around the scan and the gated norm, and a backward pass by hand.

The gradients of drive and gate are written side by side into one matrix, so that one product carries both to the
workspace and one to the weights; the scan's launches hand out the bias's gradient with the others.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels.launch  # noqa: F401  before triton: it chooses the interpreter
from kernels.cortex import launches as scan
from kernels.cortex.fused import COLUMN_WIDTHS
from kernels.cortex.reference import CortexState
from kernels.cortex.spike import SPIKES
from kernels.cortex_circuit.reference import CortexCircuitOutput
from kernels.gated_norm import fused as gated_norm
from kernels.launch import check_launchable
from kernels.linear import RoundedWeights, idle_gpu, product_gradients


class _Options(NamedTuple):
    spike_kind: str
    constants: tuple[float, float, float]  # threshold, adaptation strength and decay
    eps: float
    recorded: bool  # whether there will be a backward pass


class _CortexCircuit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        in_projection: Tensor,
        drive_bias: Tensor,
        lateral: Tensor,
        decay: Tensor,
        out_projection: Tensor,
        voltage: Tensor,
        adaptation: Tensor,
        last_spikes: Tensor,
        go: Tensor | None,
        document_start: Tensor | None,
        rounded_in: Tensor,
        rounded_out: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rows = h.reshape(-1, h.shape[-1])
        bias = torch.zeros(2 * drive_bias.shape[0], dtype=h.dtype, device=h.device)
        bias[: drive_bias.shape[0]] = drive_bias
        projected = torch.addmm(bias, rows, rounded_in.t())
        drive, gate = projected.view(*h.shape[:2], -1).chunk(2, dim=-1)
        lateral, decay = lateral.contiguous(), decay.contiguous()
        state = CortexState(voltage.contiguous(), adaptation.contiguous(), last_spikes.contiguous())
        spikes, voltage, adaptation, last_spikes, counts, excess = scan.launch_forward(
            drive, lateral, decay, *state, document_start, options.spike_kind, *options.constants, options.recorded
        )
        activity = gated_norm.launch_forward(spikes, gate, go, lateral.shape[-1], options.eps)
        written = (activity.view(rows.shape) @ rounded_out.t()).view(h.shape)
        if options.recorded:
            kept = (rows, projected, lateral, decay, *state, go, document_start, spikes, excess, activity)
            ctx.save_for_backward(*kept, rounded_in, rounded_out)
            ctx.options = options
            ctx.weights = in_projection, out_projection
            ctx.bias_dtype = drive_bias.dtype
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return written, voltage, adaptation, last_spikes, counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_written, *grad_state, _ = grads
        (
            rows, projected, lateral, decay, voltage, adaptation, last_spikes, go, document_start, spikes, excess,
            activity, rounded_in, rounded_out,
        ) = ctx.saved_tensors  # fmt: skip
        options: _Options = ctx.options
        in_projection, out_projection = ctx.weights
        num_lanes, num_tokens, width = spikes.shape
        if grad_written is None:
            grad_written = torch.zeros_like(spikes)
        nothing = torch.zeros_like(voltage)
        state_grads = CortexState(*(nothing if grad is None else grad.contiguous() for grad in grad_state))
        grad_rows = grad_written.reshape(rows.shape)
        grad_activity = grad_rows @ rounded_out
        (grad_out_projection,) = product_gradients([out_projection], grad_rows.t(), activity.view(rows.shape))
        grad_projected = torch.empty_like(projected)
        drive, gate = projected.view(num_lanes, num_tokens, -1).chunk(2, dim=-1)
        grad_spikes, grad_go = gated_norm.launch_backward(
            spikes, gate, go, grad_activity, grad_projected[:, width:], lateral.shape[-1], options.eps
        )
        with idle_gpu():
            grad_lateral, grad_decay, grad_bias, *grad_initial = scan.launch_backward(
                grad_spikes,
                *state_grads,
                drive,
                lateral,
                decay,
                voltage,
                adaptation,
                last_spikes,
                document_start,
                spikes,
                excess,
                grad_projected.view(num_lanes, num_tokens, -1)[..., :width],
                options.spike_kind,
                *options.constants,
            )
        (grad_in_projection,) = product_gradients([in_projection], grad_projected.t(), rows)
        return (
            (grad_projected @ rounded_in).view(spikes.shape),
            grad_in_projection,
            grad_bias.to(ctx.bias_dtype),
            grad_lateral,
            grad_decay,
            grad_out_projection,
            *grad_initial,
            None if go is None else grad_go,
            *(None,) * 4,
        )


def cortex_circuit_fused(
    h: Tensor,
    in_projection: Tensor,
    drive_bias: Tensor,
    lateral: Tensor,
    decay: Tensor,
    out_projection: Tensor,
    state: CortexState,
    document_start: Tensor | None,
    go: Tensor | None,
    spike_kind: str,
    threshold: float,
    adaptation_strength: float,
    adaptation_decay: float,
    eps: float,
    *,
    rounded: tuple[RoundedWeights, RoundedWeights],
) -> CortexCircuitOutput:
    """`cortex_circuit_reference` with products in h's type and weight gradients in the weights' own.

    Raises:
        ValueError: a device, type, width or spike that the kernels do not take.
    """
    check_launchable("cortex_circuit", h, in_projection, lateral, *state, document_start, go)
    if spike_kind not in SPIKES:
        raise ValueError(f"spike is {spike_kind!r}; choose one of {', '.join(SPIKES)}")
    if lateral.shape[-1] not in COLUMN_WIDTHS:
        raise ValueError(f"cortex: a column has {lateral.shape[-1]} neurons; fused kernels take {COLUMN_WIDTHS}")
    weights = (in_projection, drive_bias, lateral, decay, out_projection)
    differentiable = (h, *weights, *state, go)
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    options = _Options(spike_kind, (threshold, adaptation_strength, adaptation_decay), eps, recorded)
    copies = (store.get([weight], h.dtype) for store, weight in zip(rounded, (in_projection, out_projection)))
    written, *final, counts = _CortexCircuit.apply(h, *weights, *state, go, document_start, *copies, options)
    num_fired, num_saturated = counts.unbind()
    return CortexCircuitOutput(written, CortexState(*final), num_fired, num_saturated)
