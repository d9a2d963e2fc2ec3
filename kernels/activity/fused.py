"""Shares of active neurons in one launch, and homeostasis as one launch of the backward pass."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.launch  # noqa: F401  before triton: it chooses the interpreter
from kernels.activity.reference import SATURATED_SHARE
from kernels.launch import check_launchable


@triton.jit
def activity_shares_kernel(
    fired_ptr,  # [L, D] int32
    saturated_ptr,  # [L, D] int32
    share_ptr,  # [L, 3] float32
    num_tokens,
    D: tl.constexpr,
    SATURATED_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_layer = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < D
    num_tokens = tl.maximum(tl.full((), num_tokens, tl.int64), 1).to(tl.float32)
    b_fired = tl.load(fired_ptr + i_layer * D + offsets, mask=mask, other=1).to(tl.float32) / num_tokens
    b_full = tl.load(saturated_ptr + i_layer * D + offsets, mask=mask, other=0).to(tl.float32) / num_tokens
    b_silent = mask & (b_fired == 0.0)
    b_saturated = mask & (b_full >= SATURATED_SHARE)
    tl.store(share_ptr + i_layer * 3, tl.sum(tl.where(mask, b_fired, 0.0), axis=0) / D)
    tl.store(share_ptr + i_layer * 3 + 1, tl.sum(b_silent.to(tl.float32), axis=0) / D)
    tl.store(share_ptr + i_layer * 3 + 2, tl.sum(b_saturated.to(tl.float32), axis=0) / D)


@triton.jit
def homeostatic_pull_kernel(
    fired_ptr,  # [L, D] int32
    num_targets_ptr,  # [] int64
    grad_ptr,  # [] float
    pull_ptr,  # [L, D] float32
    num_elements,
    num_tokens,
    STRENGTH: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    b_fired = tl.load(fired_ptr + offsets, mask=mask, other=0).to(tl.float64)
    num_targets = tl.maximum(tl.load(num_targets_ptr), 1).to(tl.float64)
    b_pull = STRENGTH * (b_fired - TARGET * tl.full((), num_tokens, tl.int64).to(tl.float64)) / num_targets
    b_pull = b_pull.to(tl.float32) * tl.load(grad_ptr).to(tl.float32)
    tl.store(pull_ptr + offsets, b_pull, mask=mask)


def activity_shares_fused(num_fired: Tensor, num_saturated: Tensor, num_tokens: int) -> Tensor:
    """`activity_shares_reference` in one launch.

    Raises:
        ValueError: the tensors are not all on one device that fused kernels run on.
    """
    check_launchable("activity_shares", num_fired, num_saturated)
    num_layers, width = num_fired.shape
    shares = torch.empty(num_layers, 3, dtype=torch.float32, device=num_fired.device)
    block = triton.next_power_of_2(width)
    activity_shares_kernel[(num_layers,)](
        num_fired.contiguous(),
        num_saturated.contiguous(),
        shares,
        num_tokens,
        D=width,
        SATURATED_SHARE=SATURATED_SHARE,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 8),
    )
    return shares


class _Pulled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        num_fired: Tensor,
        num_tokens: int,
        num_targets: Tensor,
        strength: float,
        target: float,
        *biases: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(num_fired, num_targets)
        ctx.options = num_tokens, strength, target, [bias.dtype for bias in biases]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        num_fired, num_targets = ctx.saved_tensors
        num_tokens, strength, target, dtypes = ctx.options
        pulls = torch.empty(num_fired.shape, dtype=torch.float32, device=num_fired.device)
        block = 512
        homeostatic_pull_kernel[(triton.cdiv(pulls.numel(), block),)](
            num_fired,
            num_targets,
            grad,
            pulls,
            pulls.numel(),
            num_tokens,
            STRENGTH=strength,
            TARGET=target,
            BLOCK=block,
            num_warps=4,
        )
        return grad, *(None,) * 5, *(pull.to(dtype) for pull, dtype in zip(pulls.unbind(), dtypes))


def pulled_loss(
    loss: Tensor,
    biases: Sequence[Tensor],
    num_fired: Tensor,
    num_tokens: int,
    num_targets: Tensor,
    *,
    strength: float,
    target: float,
) -> Tensor:
    """The loss, whose gradient to each layer's bias has `homeostatic_pull` added.

    Arguments:
        biases: `[D]` each. num_fired: `[L, D]` int32, contiguous. num_targets: 0-d int64.
    """
    check_launchable("pulled_loss", loss, num_fired, num_targets, *biases)
    return _Pulled.apply(loss, num_fired, num_tokens, num_targets, strength, target, *biases)
