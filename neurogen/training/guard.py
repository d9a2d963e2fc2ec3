"""Which steps to skip: those whose loss or gradient is not finite, or far outside what the last steps had."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.verdict import NUM_REMEMBERED, History, outlier_limits, verdict_reference
from neurogen.errors import UserError

__all__ = ["NUM_REMEMBERED", "Guard"]


class Guard:
    """Judges steps on the device, without the host waiting.

    A loss or gradient norm is an outlier when it exceeds the mean of the last 128 finite steps by more than `sigma`
    standard deviations and is over twice that mean; until 128 steps were seen none is. Outliers are remembered as the
    limit they crossed, so that a lasting change of level is accepted after a while.

    Arguments:
        sigma: None to skip only what is not finite.
    """

    def __init__(self, device: torch.device, *, sigma: float | None = None) -> None:
        self.sigma = sigma
        self._history = History(
            torch.zeros(2, NUM_REMEMBERED, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )

    def judge(self, loss: Tensor, grad_norm: Tensor, *, clip_norm: float = math.inf) -> tuple[Tensor, Tensor]:
        """1.0 if the step of this loss and gradient norm (0-d) is to be skipped, else 0.0; and what its gradients are
        to be multiplied by for a norm of at most `clip_norm`; both 0-d."""
        if loss.is_cuda:
            from kernels.verdict.fused import verdict_fused  # here, because Triton is needed on a GPU alone

            return verdict_fused(loss, grad_norm, self._history, sigma=self.sigma, max_norm=clip_norm)
        return verdict_reference(loss, grad_norm, self._history, sigma=self.sigma, max_norm=clip_norm)

    def limits(self) -> Tensor:
        """`[2]`: the largest loss and gradient norm that the next step may have."""
        return outlier_limits(self._history, self.sigma)

    def num_in_a_row(self) -> int:
        """How many steps up to the last one were skipped in a row; waits for the device."""
        return int(self._history.streak)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to judge alike."""
        return {"history": self._history.values, "count": self._history.num_steps, "streak": self._history.streak}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Undo `state`. Raises UserError if a tensor is missing or has another shape."""
        own = self.state()
        for name, tensor in own.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise UserError("the checkpoint's record of past losses is incomplete; resume from another checkpoint")
        self._history = History(
            *(tensors[name].to(tensor.device, tensor.dtype, copy=True) for name, tensor in own.items())
        )
