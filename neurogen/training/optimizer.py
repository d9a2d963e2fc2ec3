"""Optimisers: who is decayed, who is orthogonalised, and the state as flat tensors.

Weight decay falls on weight matrices only. Biases, time constants and relay gains set operating points and have no
reason to shrink; an embedding row is normalised right after its look-up, so its length means nothing and decay would
only raise its effective rate (OLMo 2, arXiv 2501.00656, leaves embeddings out too).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels.linear import RoundedWeights
from neurogen.errors import UserError
from neurogen.training.adamw import Copies, FusedAdamW
from neurogen.training.distributed import shard_like, whole
from neurogen.training.muon import Muon

if TYPE_CHECKING:
    from neurogen.config.schema import AdamWConfig, MuonConfig

HIDDEN, GATE, DECODER, OTHER = "hidden", "gate", "decoder", "other"
GATES = ("forget", "write", "go")


def parameter_role(name: str, param: Tensor) -> str:
    """What a parameter is to an optimiser.

    hidden: a matrix inside a region (lateral weights are batches of matrices); gate: the few rows that read a number a
    head or a column off the workspace; decoder: the matrix to the vocabulary; other: embedding, relay gains, biases,
    time constants and every other vector. All but `other` are decayed.
    """
    parts = name.split(".")
    if param.ndim < 2 or parts[0] == "embedding" or parts[-1] == "taps":
        return OTHER
    if parts[0] == "decoder":
        return DECODER
    return GATE if len(parts) > 1 and parts[-2] in GATES else HIDDEN


def num_stacked(name: str) -> int:
    """How many matrices a parameter holds one above the other, such as query, key, value and gate."""
    parts = name.split(".")
    baselines = {"query_key_value": 3, "mlp_in": 2, "lstm": 4}  # the models we compare with
    if parts[-2] in baselines:
        return baselines[parts[-2]]
    if parts[-2:] != ["in_proj", "weight"]:
        return 1
    in_memory = parts[1] in ("hippocampus", "pfc") and "mlp" not in parts
    return 4 if in_memory else 2


class ModelOptimizer:
    """One or two torch optimisers over a model's parameters, stepped as one.

    Every group keeps its peak rate; `set_rate_scale` moves all of them along the schedule. State is read and restored
    under the names `<parameter>/<buffer>`, so a checkpoint does not depend on the order of groups.
    """

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self._names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
        self._peak_rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
        self.rate_scale = 1.0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                # A recorded step reads the rate where it lies, so it lies on the device.
                if group["params"][0].is_cuda:
                    group["lr"] = torch.full((), group["lr"], device=group["params"][0].device)
        held = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
        assert len(held) == len(set(held)) == len(self._names), "each parameter belongs to one group"

    def set_rate_scale(self, scale: float) -> None:
        """Set every group's learning rate to `scale` of its peak."""
        self.rate_scale = scale
        for optimizer, rates in zip(self.optimizers, self._peak_rates):
            for group, rate in zip(optimizer.param_groups, rates):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * scale)
                else:
                    group["lr"] = rate * scale

    @property
    def learning_rate(self) -> float:
        """The rate of the first group."""
        return self._peak_rates[0][0] * self.rate_scale

    def step(self, *, skip: Tensor, grad_factor: Tensor | None = None) -> None:
        """Update every parameter, or nothing at all (moments and step counts included) where the 0-d float `skip` is 1.

        The decision is taken on the device: the host does not wait for it. `grad_factor`, 0-d, multiplies the
        gradients; they may be left multiplied.
        """
        for optimizer in self.optimizers:
            optimizer.found_inf = skip  # type: ignore[attr-defined]
            if isinstance(optimizer, FusedAdamW):
                optimizer.grad_factor = grad_factor
            elif grad_factor is not None:
                torch._foreach_mul_(_grads(optimizer), grad_factor)
            optimizer.step()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the recording of a step as a CUDA graph, which at least one plain step has preceded."""
        fused = [optimizer for optimizer in self.optimizers if isinstance(optimizer, FusedAdamW)]
        for optimizer in fused:
            optimizer.prepare_recording()
        yield
        for optimizer in fused:
            optimizer.finish_recording()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def unborn_state(self) -> list[Tensor]:
        """Tensors as large as the state that the first step will make; [] once it has been made."""
        return [
            torch.empty_like(param, dtype=_state_dtype(optimizer, param))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for param in group["params"]
            if not optimizer.state.get(param)
            for _ in range(1 if isinstance(optimizer, Muon) else 2)
        ]

    def state_tensors(self) -> dict[str, Tensor]:
        """Every buffer by `<parameter>/<buffer>`: what exact continuation needs."""
        return {
            f"{self._names[param]}/{key}": whole(value)
            for optimizer in self.optimizers
            for param, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore `state_tensors()`. Raises UserError when the tensors are another model's or optimiser's."""
        params = {name: param for param, name in self._names.items()}
        owner = {
            param: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for param in group["params"]
        }
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for full, tensor in tensors.items():
            name, _, key = full.rpartition("/")
            if name not in params:
                raise UserError(f"the checkpoint's optimiser state has {full}, which this model does not; keep model.*")
            param = params[name]
            optimizer = owner[param]
            expected = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
            if key not in expected:
                raise UserError(
                    f"the checkpoint's optimiser state has {full}, which is another optimiser's; keep optimizer.name"
                )
            if key != "step" and tensor.shape != param.shape:
                raise UserError(
                    f"the checkpoint's {full} has shape {tuple(tensor.shape)}, not {tuple(param.shape)}; keep model.*"
                )
            dtype = torch.float32 if key == "step" else _state_dtype(optimizer, param)
            own = tensor.detach().to(param.device, dtype, copy=True)
            optimizer.state[param][key] = own if key == "step" else shard_like(own, param)


def _state_dtype(optimizer: torch.optim.Optimizer, param: Tensor) -> torch.dtype:
    """The type of what an optimiser keeps of a parameter, but for its number of steps."""
    return optimizer.moments if isinstance(optimizer, FusedAdamW) else param.dtype


def _grads(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = (param for group in optimizer.param_groups for param in group["params"])
    return [param.grad for param in params if param.grad is not None]


def rounded_copies(model: nn.Module) -> tuple[dict[Tensor, Tensor], Callable[[], None]]:
    """The half-precision copies that a model's fused kernels keep of their float32 weights, by weight; and what to call
    when all of them have been written."""
    stores = [
        store
        for module in model.modules()
        for store in getattr(module, "rounded_weights", ())
        if isinstance(store, RoundedWeights) and store.parts
    ]
    copies = {weight: part for store in stores for weight, part in store.parts}

    def followed() -> None:
        for store in stores:
            store.follow()

    return copies, followed


def build_optimizer(model: nn.Module, config: AdamWConfig | MuonConfig) -> ModelOptimizer:
    """The optimiser `config` names, over all parameters of `model`."""
    named = list(model.named_parameters())
    role = {param: parameter_role(name, param) for name, param in named}
    kept = [param for _, param in named if role[param] == OTHER]
    if config.name == "adamw":
        decayed = [p for _, p in named if role[p] != OTHER]
        # What updates all parameters can keep all copies.
        return ModelOptimizer(model, [_adamw(decayed, kept, config, config.lr, lambda: rounded_copies(model))])
    assert config.name == "muon", config.name
    hidden = [(name, param) for name, param in named if role[param] == HIDDEN]
    muon = Muon(
        [
            {"params": [param for name, param in hidden if num_stacked(name) == count], "num_stacked": count}
            for count in sorted({num_stacked(name) for name, _ in hidden})
        ],
        config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,  # type: ignore[union-attr]
        nesterov=config.nesterov,  # type: ignore[union-attr]
        num_iterations=config.num_iterations,  # type: ignore[union-attr]
    )
    rate: float | None = config.lr_rest  # type: ignore[union-attr]
    decayed = [param for _, param in named if role[param] in (GATE, DECODER)]
    return ModelOptimizer(model, [muon, _adamw(decayed, kept, config, config.lr if rate is None else rate)])


def _adamw(
    decayed: list[nn.Parameter],
    kept: list[nn.Parameter],
    config: AdamWConfig | MuonConfig,
    lr: float,
    copies: Copies | None = None,
) -> torch.optim.Optimizer:
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    if all(param.is_cuda and type(param.data) is Tensor and param.dtype == torch.float32 for param in decayed + kept):
        moments = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.moments]
        return FusedAdamW(groups, lr, betas=betas, eps=config.eps, copies=copies, moments=moments)
    if config.moments != "float32":
        raise UserError(
            f"optimizer.moments={config.moments}: needs whole float32 parameters on a CUDA GPU; use float32 on a CPU, "
            "with trainer=fsdp or trainer.dtype=float64"
        )
    # `fused` is one loop on a CPU, and can skip a step without the host.
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, fused=True)
