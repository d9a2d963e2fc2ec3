"""Random arguments for the cortex, and running them forward and backward."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cortex import CortexOutput, CortexState, cortex

GRADIENTS = ("drive", "lateral_weight", "decay", "voltage", "adaptation", "spikes")


class Arguments(NamedTuple):
    """The tensors of a call of `cortex`, float32 but for the drive's type."""

    drive: Tensor
    lateral_weight: Tensor
    decay: Tensor
    state: CortexState
    document_start: Tensor | None


class Cotangents(NamedTuple):
    """What the loss multiplies spikes `[B, T, D]` and final state by."""

    spikes: Tensor
    state: CortexState


def random_arguments(
    num_lanes: int,
    num_tokens: int,
    num_columns: int,
    column_width: int,
    *,
    start_rate: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Arguments, Cotangents]:
    """Arguments like a new model's: drive about 0.5, time constants of 1.5 to 200 tokens, a state that is not zero.

    The drive is half of a wider tensor, as an input projection leaves it.
    """
    random = torch.Generator().manual_seed(seed)
    width = num_columns * column_width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    def state(mean: float, scale: float) -> CortexState:
        return CortexState(*(mean + scale * normal(num_lanes, width) for _ in range(3)))

    time_constants = torch.linspace(math.log(1.5), math.log(200.0), width).exp()
    decay = torch.exp(-1.0 / time_constants)[torch.randperm(width, generator=random)]
    drive = (0.5 + normal(num_lanes, num_tokens, 2 * width)).to(device, dtype)[..., :width]
    lateral_weight = normal(num_columns, column_width, column_width) * (0.5 / math.sqrt(column_width))
    initial = state(0.2, 0.3)
    initial = initial._replace(spikes=initial.spikes.clamp(0.0, 4.0))
    start = torch.rand((num_lanes, num_tokens), generator=random) < start_rate if start_rate > 0 else None
    cotangents = Cotangents(normal(num_lanes, num_tokens, width).to(device, dtype), state(0.0, 1.0))
    return (
        Arguments(
            drive,
            lateral_weight.to(device),
            decay.to(device),
            CortexState(*(x.to(device) for x in initial)),
            None if start is None else start.to(device),
        ),
        cotangents._replace(state=CortexState(*(x.to(device) for x in cotangents.state))),
    )


def leaves(arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    """The arguments as leaves of a new graph, in another type if one is given. The drive stays a view of its leaf."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(dtype or x.dtype).clone().requires_grad_()

    wide = torch.cat([arguments.drive, torch.zeros_like(arguments.drive)], -1)
    wide = leaf(wide)
    drive = wide[..., : arguments.drive.shape[-1]]
    drive.retain_grad()
    return Arguments(
        drive,
        leaf(arguments.lateral_weight),
        leaf(arguments.decay),
        CortexState(*(leaf(x) for x in arguments.state)),
        arguments.document_start,
    )


def loss_of(out: CortexOutput, cotangents: Cotangents) -> Tensor:
    state = zip(out.state, cotangents.state)
    dtype = out.state.voltage.dtype
    return (out.spikes.to(dtype) * cotangents.spikes.to(dtype)).sum() + sum((x * g.to(dtype)).sum() for x, g in state)


def gradients(arguments: Arguments) -> dict[str, Tensor]:
    drive, lateral_weight, decay, state, _ = arguments
    tensors = (drive, lateral_weight, decay, *state)
    return {name: x.grad if x.grad is not None else torch.zeros_like(x) for name, x in zip(GRADIENTS, tensors)}


def run(arguments: Arguments, cotangents: Cotangents, **options) -> tuple[CortexOutput, dict[str, Tensor]]:
    """Forward and backward; the arguments are `leaves`."""
    drive, lateral_weight, decay, state, document_start = arguments
    out = cortex(drive, lateral_weight, decay, state, document_start, **options)
    loss_of(out, cotangents).backward()
    return out, gradients(arguments)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """norm(actual - expected) / norm(expected) in float64; the plain norm of actual where expected is zero."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / (expected.norm() if expected.norm() > 0 else 1.0))


def assert_close(actual, expected, output_tolerance: float, gradient_tolerance: float) -> None:
    """Compare two results of `run`, counts exactly."""
    (out, grads), (out_expected, grads_expected) = actual, expected
    for name, x, y in [
        ("spikes", out.spikes, out_expected.spikes),
        *((name, x, y) for name, x, y in zip(CortexState._fields, out.state, out_expected.state)),
    ]:
        assert relative_error(x, y) <= output_tolerance, name
    for name in GRADIENTS:
        assert relative_error(grads[name], grads_expected[name]) <= gradient_tolerance, f"gradient to {name}"
