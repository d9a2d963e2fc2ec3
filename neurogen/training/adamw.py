"""AdamW as one launch over all parameters of a group, for parameters that lie whole on one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.adamw import AdamWOptions
from kernels.addresses import AddressTable

if TYPE_CHECKING:
    from kernels.adamw.fused import Launch

# From a parameter to the half-precision copies that an update keeps up to date, and a call that says it did.
Copies = Callable[[], tuple[dict[Tensor, Tensor], Callable[[], None]]]


class FusedAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` for contiguous float32 parameters, with state of the same names.

    Setting `found_inf` to a 0-d tensor that is 1 leaves everything as it is, without the host looking at it (the
    convention of torch's fused optimisers); `grad_factor`, 0-d, multiplies the gradients.

    Arguments:
        copies: half-precision copies of parameters to write along with them, by parameter; None for none.
        moments: the type that both moments are kept in. Each update is made in float32 and rounded to it; in bfloat16 a
            moment stands still under changes of less than 2^-9 of it, so betas must leave room.
    """

    found_inf: Tensor | None = None
    grad_factor: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        copies: Copies | None = None,
        moments: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._copies = copies
        self.moments = moments
        self._tables: dict[int, tuple[list[Tensor], AddressTable]] = {}  # by group, with its parameters

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        from kernels.adamw.fused import launch_all  # here, because Triton is needed on a GPU alone

        assert closure is None, "FusedAdamW takes no closure"
        copies, followed = ({}, None) if self._copies is None else self._copies()
        for index, group in enumerate(self.param_groups):
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            device = params[0].device
            grads = [aligned(param.grad) for param in params]  # some are copies, which have to outlast the launch
            launch = self.describe(
                self._table(index, params),
                group,
                params,
                grads,
                copies,
                lr=group["lr"] if isinstance(group["lr"], Tensor) else torch.full((), group["lr"], device=device),
                grad_factor=torch.ones((), device=device) if self.grad_factor is None else self.grad_factor,
                skip=torch.zeros((), device=device) if self.found_inf is None else self.found_inf,
            )
            launch_all(launch, params)
        if followed is not None:
            followed()

    def describe(
        self,
        table: AddressTable,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        copies: dict[Tensor, Tensor],
        *,
        lr: Tensor,
        grad_factor: Tensor,
        skip: Tensor,
    ) -> Launch:
        """The step of some parameters of a group, to be launched by `kernels.adamw.fused`; the numbers are 0-d.

        What it knows of tensors is where they lie: gradients have to be kept until it was launched.
        """
        from kernels.adamw.fused import describe

        states = [self._state(param) for param in params]
        return describe(
            table,
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            [copies.get(param) for param in params],
            lr=lr,
            grad_scale=grad_factor,
            skip=skip,
            options=AdamWOptions(group["betas"][0], group["betas"][1], group["eps"], group["weight_decay"]),
        )

    def current_copies(self) -> dict[Tensor, Tensor]:
        """The half-precision copies that a step writes, by parameter."""
        return {} if self._copies is None else self._copies()[0]

    def prepare_recording(self) -> None:
        """To be called before a step is recorded as a CUDA graph; at least one plain step has been taken."""
        for _, table in self._tables.values():
            table.prepare_recording()

    def finish_recording(self) -> None:
        """To be called once the step was recorded, before it is replayed."""
        for _, table in self._tables.values():
            table.finish_recording()

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=self.moments)
        return state

    def _table(self, index: int, params: list[Tensor]) -> AddressTable:
        from kernels.adamw.fused import make_table

        held = self._tables.get(index)
        if held is None or len(held[0]) != len(params) or any(a is not b for a, b in zip(held[0], params)):
            held = self._tables[index] = (params, make_table(params))
        return held[1]


def aligned(grad: Tensor | None) -> Tensor:
    """The gradient, beginning on 16 bytes, which one that is a part of a larger buffer may not do."""
    assert grad is not None
    return grad if grad.data_ptr() % 16 == 0 else grad.clone()
