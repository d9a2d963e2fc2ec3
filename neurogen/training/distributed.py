"""Several processes that train one model: who they are, what they share, and how a model is spread over them.

torchrun starts the processes. Each reads its own share of the lanes; gradients are summed after the backward pass (ddp,
`neurogen/training/exchange.py`), or averaged during it and kept in shards together with parameters and optimiser state
(FSDP2). Everything written is written by rank 0, and a
checkpoint holds whole tensors and the state of all lanes, so that it loads at any number of processes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neurogen.errors import UserError

NONE, DDP, FSDP = "none", "ddp", "fsdp"
STRATEGIES = (NONE, DDP, FSDP)


@dataclass(frozen=True)
class World:
    """This process among all of a run; the default is a run of one process, where every method is trivial.

    Decisions of the host (numbers of targets, the clock, signals) travel by gloo, so no rank waits for its GPU to
    agree on one; tensors travel by the backend of their device.

    Arguments:
        strategy: none, ddp or fsdp.
        rank, size: of all processes; local_rank: on this machine.
    """

    strategy: str = NONE
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether parameters are sharded, and gradients exchanged while they are made."""
        return self.strategy == FSDP

    def share(self, total: int, what: str) -> int:
        """total / size. Raises UserError, naming `what`, if it does not divide."""
        if total % self.size:
            raise UserError(f"{what}={total}: must be a multiple of the {self.size} processes")
        return total // self.size

    # What the hosts agree on.

    def sum_count(self, count: int) -> int:
        """The sum over all ranks of a number the host knows."""
        return count if self.size == 1 else int(self._agree(count, dist.ReduceOp.SUM))

    def highest(self, number: int) -> int:
        """The largest over all ranks."""
        return number if self.size == 1 else int(self._agree(number, dist.ReduceOp.MAX))

    def all_agree(self, opinion: bool) -> bool:
        """Whether it is true on every rank."""
        return not self.highest(int(not opinion))

    def from_main(self, number: float) -> float:
        """Rank 0's number."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(tensor, 0)
        return float(tensor)

    def tree_from_main(self, tree: Any) -> Any:
        """Rank 0's JSON-able tree, on every rank."""
        if self.size == 1:
            return tree
        content = json.dumps(tree).encode() if self.is_main else b""
        buffer = torch.zeros(int(self.from_main(len(content))), dtype=torch.uint8)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(buffer, 0)
        return json.loads(bytes(buffer.tolist()))

    @contextlib.contextmanager
    def one_by_one(self) -> Iterator[None]:
        """The first process of each machine goes through alone, the others after it: it fills caches they read."""
        if self.size > 1 and self.local_rank > 0:
            self.highest(0)
        try:
            yield
        finally:
            if self.size > 1 and self.local_rank == 0:
                self.highest(0)

    def _agree(self, number: int, how: Any) -> Tensor:
        tensor = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(tensor, how)
        return tensor

    # What travels between devices.

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on every rank; the host does not wait."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def all_lanes(self, tensor: Tensor) -> Tensor:
        """The lanes (first dimension) of all ranks, in the order of the ranks."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    # How a model is spread.

    def spread(self, model: nn.Module, units: Iterable[nn.Module] = ()) -> nn.Module:
        """Prepare a placed model for training; the result is what the training step calls.

        With ddp that is the model itself, given rank 0's parameters and buffers. From then on the ranks take the same
        steps, since each applies the same sum of all gradients.

        FSDP shards the parameters in place, so the optimiser has to be built afterwards. Parameters are gathered on the
        way forward and kept until gradients have gone back through them: a forward pass ends with terms that read
        biases of its first layers.

        Arguments:
            units: modules inside `model`, each called once in a forward pass: FSDP gathers each of them, and averages
                and shards its gradients, apart from the others and while others compute. The rest of the model is a
                unit too.
        """
        if self.strategy == DDP:
            for tensor in itertools.chain(model.parameters(), model.buffers()):
                dist.broadcast(tensor.detach(), 0)
        if self.strategy == FSDP:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(next(model.parameters()).device.type, (self.size,))
            together = [*units, model]
            for unit in together:
                fully_shard(unit, mesh=mesh, reshard_after_forward=False)
                unit.register_forward_pre_hook(_note_new_values)
            for unit in together:
                # The whole, which is there until the end, in the place of what came before in past forward passes: rank
                # 0, which draws samples, has had others, and would gather alone.
                unit.set_modules_to_backward_prefetch([model])  # type: ignore[operator]
        return model

    def begin_part(self, spread: nn.Module, *, last: bool) -> None:
        """Before forward and backward of one part of a step: FSDP exchanges gradients in the last part only."""
        if self.strategy == FSDP:
            spread.set_requires_gradient_sync(last)  # type: ignore[operator]

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Inside, the parameters are whole on every rank and the model may run on any of them alone, without
        gradients."""
        if self.strategy != FSDP:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()

    def close(self) -> None:
        """Leave the other processes. Recorded steps that hold exchanges between GPUs have to be released before: NCCL
        waits until they are."""
        if self.size > 1:
            dist.destroy_process_group()


SINGLE = World()


def connect(strategy: str, device: str) -> World:
    """Join the other processes that torchrun started, as its environment variables tell.

    Raises UserError if torchrun and `strategy` contradict each other, or `device` names a single GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if strategy == NONE:
        if size > 1:
            raise UserError(f"trainer.distributed=none: torchrun started {size} processes; use trainer=ddp or fsdp")
        return SINGLE
    if "RANK" not in os.environ:
        raise UserError(
            f"trainer.distributed={strategy}: start it with torchrun --nproc-per-node=N scripts/train.py ..."
        )
    if device.startswith("cuda:"):
        raise UserError(f"trainer.device={device}: each process takes a GPU of its own; use trainer.device=cuda")
    world = World(strategy, int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc-per-node: more processes than the {torch.cuda.device_count()} GPUs of this machine"
            )
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return world


def device_of(world: World, name: str) -> str:
    """The device name for this rank: `auto` and `cuda` become its own GPU."""
    if world.strategy == NONE or name == "cpu" or not torch.cuda.is_available():
        return name
    return f"cuda:{world.local_rank}"


def _note_new_values(module: nn.Module, _inputs: object) -> None:
    """Parameters that FSDP has gathered hold new values under the old version, often at the old address too, and what
    is made from weights once a change (their half-precision copies) goes by those."""
    torch.autograd.graph.increment_version([param for param in module.parameters() if not is_sharded(param)])


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor with all its parts, which every rank has to ask for; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that every rank has, divided as `like` is; unchanged if `like` is whole."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    replicated = DTensor.from_local(tensor.to(like.device), like.device_mesh, [Replicate()], run_check=False)  # type: ignore[attr-defined]
    return replicated.redistribute(placements=like.placements)  # type: ignore[attr-defined]
