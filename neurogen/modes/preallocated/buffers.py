"""Buffers that are made once a sequence, and the small pieces of arithmetic that work in them.

A *tape* has one slot a token when a reverse pass will need it, and a single slot, overwritten by every token, when not.
Everything here writes through `out=` or in place, so that no token allocates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

silu = torch.ops.aten.silu.out
silu_backward = torch.ops.aten.silu_backward.grad_input
sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


@dataclass(frozen=True)
class Room:
    """Where a sequence's buffers are made.

    Arguments:
        lanes: B.
        num_tokens: T.
        saved: whether a reverse pass will follow, so that every token's values are kept.
        device: of all buffers.
        dtype: of sums and states, float32 or float64.
        matmul_dtype: of the large projections' inputs and outputs.
    """

    lanes: int
    num_tokens: int
    saved: bool
    device: torch.device
    dtype: torch.dtype
    matmul_dtype: torch.dtype

    def buffer(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)

    def tape(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """`[slots, *shape]`."""
        return self.buffer(self.num_tokens if self.saved else 1, *shape, dtype=dtype)

    def mean(self, width: int, eps: float) -> Means:
        """What `normalize` needs for the mean square of `width` channels."""
        return Means(self.constant(1.0 / width), self.constant(-1.0 / width), self.constant(eps))

    def constant(self, value: float) -> Tensor:
        return constant(value, self.dtype)

    def state_tape(self, *shape: int) -> Tensor:
        """`[slots, *shape]` of a state before the first token and after every one: two slots in turn if not saved."""
        return self.buffer(self.num_tokens + 1 if self.saved else 2, *shape)


def constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor on the host, for operations that would make it one anew at every call, and of the type they
    compute in, for they would cast it at every call. A GPU takes it as an argument of the kernel."""
    return torch.tensor(value, dtype=dtype)


class Means(NamedTuple):
    """Constants of a normalisation by 1 / sqrt(share * sum(x^2) + eps)."""

    share: Tensor
    minus_share: Tensor
    eps: Tensor


def normalize(x: Tensor, out: Tensor, scale: Tensor, scratch: Tensor, means: Means) -> None:
    """out = x * scale with scale = 1 / sqrt(share * sum(x^2) + eps) over the last dimension; scale is `[..., 1]`."""
    torch.mul(x, x, out=scratch)
    torch.sum(scratch, -1, keepdim=True, out=scale)
    scale.mul_(means.share).add_(means.eps).rsqrt_()
    torch.mul(x, scale, out=out)


def normalize_backward(
    grad: Tensor, normed: Tensor, scale: Tensor, scratch: Tensor, sums: Tensor, means: Means, *, out: Tensor
) -> None:
    """out = scale * (grad - normed * share * sum(grad * normed)), the gradient of `normalize` at its input.

    `sums` is scratch shaped like scale; `out` may be `grad`.
    """
    torch.mul(grad, normed, out=scratch)
    torch.sum(scratch, -1, keepdim=True, out=sums)
    sums.mul_(means.minus_share)
    torch.addcmul(grad, normed, sums, out=out)
    out.mul_(scale)


class Norm:
    """RMS norm of the workspace `[B, D]`, which may be read by several projections."""

    def __init__(self, room: Room, width: int, eps: float) -> None:
        self.means = room.mean(width, eps)
        self.normed = room.tape(room.lanes, width)
        self.scale = room.tape(room.lanes, 1)
        self.scratch = room.buffer(room.lanes, width)
        self.sums = room.buffer(room.lanes, 1)

    def forward(self, i: int, x: Tensor) -> Tensor:
        normalize(x, self.normed[i], self.scale[i], self.scratch, self.means)
        return self.normed[i]

    def backward(self, i: int, grad: Tensor, grad_x: Tensor) -> None:
        """Add to `grad_x` the gradient that arrives through the norm; `grad` is overwritten."""
        normalize_backward(grad, self.normed[i], self.scale[i], self.scratch, self.sums, self.means, out=grad)
        grad_x.add_(grad)


class Projection:
    """y = W x + b, a token at a time; inputs and outputs stay for the reverse pass.

    The weight's gradient is one product over all tokens at the end, since the buffers hold them all.

    Arguments:
        weight: `[out, in]`, in the type the product is done in.
        bias: `[out]` or None.
    """

    def __init__(self, room: Room, weight: Tensor, bias: Tensor | None = None) -> None:
        self.room, self.weight, self.bias = room, weight, bias
        self.input = room.tape(room.lanes, weight.shape[1], dtype=weight.dtype)
        self.output = room.tape(room.lanes, weight.shape[0], dtype=weight.dtype)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def forward(self, i: int) -> Tensor:
        """Project `input[i]` into `output[i]`."""
        if self.bias is None:
            return torch.mm(self.input[i], self.weight.t(), out=self.output[i])
        return torch.addmm(self.bias, self.input[i], self.weight.t(), out=self.output[i])

    def prepare_backward(self) -> None:
        self.grad_output = torch.empty_like(self.output)
        self.grad_product = torch.empty_like(self.input[0]) if len(self.input) else self.input.new_empty(0)
        self.grad_input = self.grad_product.to(self.room.dtype)

    def backward(self, i: int) -> Tensor:
        """From `grad_output[i]` to the gradient at `input[i]`, in the room's type; a buffer the next token overwrites."""
        torch.mm(self.grad_output[i], self.weight, out=self.grad_product)
        if self.grad_input is not self.grad_product:
            self.grad_input.copy_(self.grad_product)
        return self.grad_input

    def gradients(self) -> list[Tensor]:
        grad_output, rows = self.grad_output.flatten(0, 1), self.input.flatten(0, 1)
        grad_weight = grad_output.t() @ rows
        return [grad_weight] if self.bias is None else [grad_weight, grad_output.sum(0)]
