"""Running sums of what steps measured, kept on the device and read at intervals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neurogen.errors import UserError
from neurogen.training.update import StepResult

FIXED = ("loss", "targets", "correct", "grad_norm", "steps")


class Meter:
    """Sums over the steps since the last reading; skipped steps are counted and left out.

    Adding never waits for the device; `read` does, once. The sums are part of a checkpoint, so that a run resumed
    inside an interval reports the same averages.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._skipped = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, result: StepResult) -> None:
        names = (*FIXED, *sorted(result.health))
        count = torch.full((), float(result.num_targets), dtype=torch.float64, device=self._device)
        values = [result.loss.double() * count, count, result.num_correct, result.grad_norm, torch.ones_like(count)]
        values += [result.health[name] for name in names[len(FIXED) :]]
        row = torch.stack([value.double() for value in values])
        row = torch.where(result.skipped.bool(), torch.zeros_like(row), row)
        if self._sums is None:
            self._names, self._sums = names, torch.zeros_like(row)
        self._sums = self._sums + row
        self._skipped = self._skipped + result.skipped.double()

    def read(self) -> dict[str, float]:
        """The metrics of the interval, which starts anew: one synchronisation.

        train/loss is nan if every step of the interval was skipped; train/skipped_steps counts from the start of the
        run.
        """
        if self._sums is None:
            return {}
        *sums, skipped = torch.cat([self._sums, self._skipped[None]]).tolist()
        by_name = dict(zip(self._names, sums))
        self._sums = None
        steps, targets = by_name["steps"], by_name["targets"]
        metrics = {
            "train/loss": by_name["loss"] / targets if targets else math.nan,
            "train/accuracy": by_name["correct"] / targets if targets else math.nan,
            "train/grad_norm": by_name["grad_norm"] / steps if steps else math.nan,
            "train/skipped_steps": skipped,
        }
        for name in self._names[len(FIXED) :]:
            metrics[f"health/{name}"] = by_name[name] / steps if steps else math.nan
        return metrics

    def state(self) -> tuple[dict[str, Tensor], list[str]]:
        """The sums as tensors, and what they are sums of."""
        tensors = {"skipped": self._skipped}
        if self._sums is not None:
            tensors["sums"] = self._sums
        return tensors, list(self._names)

    def load_state(self, tensors: dict[str, Tensor], names: list[str]) -> None:
        """Undo `state`. Raises UserError if the two do not fit together."""
        sums = tensors.get("sums")
        if "skipped" not in tensors or (sums is not None and sums.shape != (len(names),)):
            raise UserError("the checkpoint's running averages are incomplete; resume from another checkpoint")
        self._skipped = tensors["skipped"].to(self._device, torch.float64)
        self._names, self._sums = tuple(names), None if sums is None else sums.to(self._device, torch.float64)
