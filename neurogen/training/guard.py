"""Which steps to skip: those whose loss or gradient is not finite, or far outside what the last steps had."""

from __future__ import annotations

import torch
from torch import Tensor

from neurogen.errors import UserError

NUM_REMEMBERED = 128  # steps, as OLMo 2 takes for the same purpose (arXiv 2501.00656)
LEAST_FACTOR = 2.0  # of the mean: a long run of very equal steps would otherwise make outliers of harmless ones


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
        self._history = torch.zeros(2, NUM_REMEMBERED, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._streak = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if the step of this loss and gradient norm (0-d) is to be skipped, else 0.0, as a 0-d float32."""
        values = torch.stack([loss.detach().double(), grad_norm.detach().double()])
        finite = torch.isfinite(values).all()
        skipped = ~finite
        if self.sigma is not None:
            limits = self.limits()
            skipped = skipped | (values > limits).any()
            extended = torch.cat([self._history[:, 1:], torch.minimum(values, limits)[:, None]], dim=1)
            # In place, so that a recorded step finds them where they were.
            self._history.copy_(torch.where(finite, extended, self._history))
            self._count.add_(finite)
        self._streak.copy_(torch.where(skipped, self._streak + 1, torch.zeros_like(self._streak)))
        return skipped.to(torch.float32)

    def limits(self) -> Tensor:
        """`[2]`: the largest loss and gradient norm that the next step may have."""
        if self.sigma is None:
            return torch.full_like(self._history[:, 0], torch.inf)
        mean = self._history.mean(dim=1)
        limits = torch.maximum(mean + self.sigma * self._history.std(dim=1), LEAST_FACTOR * mean)
        return torch.where(self._count >= NUM_REMEMBERED, limits, torch.inf)

    def num_in_a_row(self) -> int:
        """How many steps up to the last one were skipped in a row; waits for the device."""
        return int(self._streak)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to judge alike."""
        return {"history": self._history, "count": self._count, "streak": self._streak}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Undo `state`. Raises UserError if a tensor is missing or has another shape."""
        own = self.state()
        for name, tensor in own.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise UserError("the checkpoint's record of past losses is incomplete; resume from another checkpoint")
        self._history, self._count, self._streak = (
            tensors[name].to(tensor.device, tensor.dtype, copy=True) for name, tensor in own.items()
        )
