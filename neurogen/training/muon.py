"""Muon: momentum whose update is replaced by the nearest orthogonal matrix (Jordan, 2024,
kellerjordan.github.io/posts/muon).

torch.optim.Muon exists from torch 2.9, takes single matrices only and iterates in bfloat16; the hyper-columns'
lateral weights are batches of C x C matrices, torch 2.6 is supported, and runs in float32 and float64 must be exact,
hence this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from neurogen.training.distributed import is_sharded, shard_like, whole

# The quintic a x + b x^3 + c x^5, steepest at zero: after five rounds it carries any singular value in [0.002, 1]
# into about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)
# The root mean square of AdamW's updates in practice, so that one learning rate serves both (Liu et al., 2025, arXiv
# 2502.16982).
ADAMW_UPDATE_RMS = 0.2


def orthogonalize(matrix: Tensor, *, num_iterations: int = 5, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz iteration towards U V^T of `matrix` = U S V^T.

    Arguments:
        matrix: [..., M, N]; leading dimensions are a batch of separate matrices.
    Returns a matrix of the same shape and dtype with every non-negligible singular value near 1 (0.7 to 1.2).
    CUDA float32 iterates in bfloat16, which the method tolerates by design; the CPU keeps the dtype.
    """
    a, b, c = QUINTIC
    dtype = torch.bfloat16 if matrix.is_cuda and matrix.dtype == torch.float32 else matrix.dtype
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    for _ in range(num_iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.view(shape)
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices [..., M, N] (see the module for why torch's own does not fit).

    m = momentum m + (1 - momentum) g; the update is orthogonalize(m, or g (1 - momentum) + momentum m with Nesterov)
    times 0.2 sqrt(max(M, N)); weight decay is decoupled. A group's `num_stacked` says that its parameters hold that
    many matrices one above the other, each orthogonalised alone. Setting `found_inf` to a 0-d tensor that is 1 leaves
    parameters and momentum as they are, without the host looking at it (the convention of torch's fused optimisers).
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        num_iterations: int = 5,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "num_iterations": num_iterations,
                "num_stacked": 1,
            },
        )
        for group in self.param_groups:
            for param in group["params"]:
                assert param.ndim >= 2, f"Muon updates matrices, not a tensor of shape {tuple(param.shape)}"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    alike.setdefault(param.shape, []).append(param)
            for params in alike.values():
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Move parameters of one shape, whose matrices are orthogonalised in one batch."""
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        momenta = [self.state[param]["momentum_buffer"] for param in params]
        # A matrix is orthogonal as a whole: every process works on all of it and keeps its own part.
        grads = [param.grad for param in params if param.grad is not None]  # all of them, see step
        old, grad, matrix = (
            torch.stack([whole(each) for each in tensors])
            for tensors in (momenta, grads, [param.detach() for param in params])
        )
        new = old.lerp(grad, 1.0 - group["momentum"])
        direction = grad.lerp(new, group["momentum"]) if group["nesterov"] else new
        parts = direction.unflatten(-2, (group["num_stacked"], -1))
        update = orthogonalize(parts, num_iterations=group["num_iterations"]).flatten(-3, -2)
        scale = ADAMW_UPDATE_RMS * math.sqrt(max(parts.shape[-2:]))
        moved = matrix * (1.0 - group["lr"] * group["weight_decay"]) - update * (group["lr"] * scale)
        if self.found_inf is not None:
            skip = self.found_inf.bool()
            new, moved = torch.where(skip, old, new), torch.where(skip, matrix, moved)
        for targets, values in ((momenta, new), (params, moved)):
            own = [shard_like(value, target) for value, target in zip(values, targets)]
            if any(is_sharded(target) for target in targets):
                for target, value in zip(targets, own):
                    target.copy_(value)
            else:
                torch._foreach_copy_(targets, own)
