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

    Write x to `input(i)` and call `forward(i)`; in reverse, write the gradient at y to `grad_output(i)` and call
    `backward(i)`. All these are in the room's type; if the weight has another, the product is done in the weight's.
    The weight's gradient is one product over all tokens at the end, since the buffers hold them all.

    Arguments:
        weight: `[out, in]`, in the type the product is done in.
        bias: `[out]` or None.
    """

    def __init__(self, room: Room, weight: Tensor, bias: Tensor | None = None) -> None:
        self.room, self.weight, self.bias = room, weight, bias
        self.converts = weight.dtype != room.dtype
        self.rows = room.tape(room.lanes, weight.shape[1], dtype=weight.dtype)
        self.output = room.tape(room.lanes, weight.shape[0])
        self.staged_input = room.buffer(room.lanes, weight.shape[1]) if self.converts else None
        self.product = room.buffer(room.lanes, weight.shape[0], dtype=weight.dtype) if self.converts else None

    @property
    def inputs(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def input(self, i: int) -> Tensor:
        """`[B, in]`, to be written before `forward(i)`."""
        return self.rows[i] if self.staged_input is None else self.staged_input

    def forward(self, i: int) -> Tensor:
        """Project `input(i)`; returns `output[i]`."""
        if self.staged_input is not None:
            self.rows[i].copy_(self.staged_input)
        product = self.output[i] if self.product is None else self.product
        torch.mm(self.rows[i], self.weight.t(), out=product)
        if self.bias is not None:  # not addmm: on a GPU that may take a workspace at every call
            product.add_(self.bias)
        return product if self.product is None else self.output[i].copy_(product)

    def prepare_backward(self) -> None:
        room = self.room
        self.grad_rows = torch.empty_like(self.output, dtype=self.weight.dtype)
        self.grad_product = self.rows.new_empty(self.rows.shape[1:])
        self.grad_input = torch.empty_like(self.grad_product, dtype=room.dtype) if self.converts else self.grad_product
        self.staged_grad = room.buffer(*self.output.shape[1:]) if self.converts else None

    def grad_output(self, i: int) -> Tensor:
        """`[B, out]`, to be written before `backward(i)`."""
        return self.grad_rows[i] if self.staged_grad is None else self.staged_grad

    def backward(self, i: int) -> Tensor:
        """From `grad_output(i)` to the gradient at `input(i)`, in a buffer that the next token overwrites."""
        if self.staged_grad is not None:
            self.grad_rows[i].copy_(self.staged_grad)
        torch.mm(self.grad_rows[i], self.weight, out=self.grad_product)
        return self.grad_input.copy_(self.grad_product) if self.converts else self.grad_product

    def gradients(self) -> list[Tensor]:
        grad_rows = self.grad_rows.flatten(0, 1)
        grad_weight = grad_rows.t() @ self.rows.flatten(0, 1)
        return [grad_weight] if self.bias is None else [grad_weight, grad_rows.sum(0)]
