"""One of two processes of tests/training/test_recorded_together.py: the same steps plainly and recorded (NCCL, 2 GPUs).

What comes out is written as <rank>.<name>.safetensors: losses, parameters, and how many steps Python took.

Arguments: a folder to work in. RANK, LOCAL_RANK and MASTER_* are in the environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from neurogen import BrainConfig, NeuroGen
from neurogen.brain import BrainState
from neurogen.config.schema import AdamWConfig, MuonConfig
from neurogen.data import Batch
from neurogen.training.distributed import World, connect, device_of
from neurogen.training.optimizer import build_optimizer
from neurogen.training.precision import Precision
from neurogen.training.recorded import RecordedUpdate, can_record
from neurogen.training.update import StepResult, Update, split_batch

LANES, WINDOW, VOCAB, NUM_STEPS = 4, 19, 257, 11
OPTIMIZERS = {"adamw": AdamWConfig(lr=3e-3), "muon": MuonConfig(lr=3e-3)}
# By name: the optimiser, and the parts of a step.
CASES = {"adamw": ("adamw", 1), "parts": ("adamw", 2), "muon": ("muon", 1)}


class CountedUpdate(Update):
    """Counts the steps that are taken or recorded, not those replayed."""

    num_calls = 0

    def __call__(self, *args, **kwargs) -> StepResult:
        self.num_calls += 1
        return super().__call__(*args, **kwargs)


def make_batch(rank: int, step: int) -> Batch:
    """Out of the ordinary on one process only: targets that do not count, none at all, and another shape."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    window = 11 if (rank, step) == (0, 7) else WINDOW
    ids = torch.randint(0, VOCAB, (LANES, window + 1), generator=generator)
    targets = ids[:, 1:].clone()
    if (rank, step) == (1, 5):
        targets[0, 0] = -100
    if (rank, step) == (1, 8):
        targets[:] = -100
    start = torch.rand(LANES, window, generator=generator) < 0.05
    counts = (targets != -100).sum(1).numpy().astype(np.int64)
    return Batch(ids[:, :-1].cuda(), targets.cuda(), start.cuda(), counts)


def walk(world: World, name: str, *, recorded: bool) -> dict[str, torch.Tensor]:
    optimizer, num_parts = CASES[name]
    torch.manual_seed(world.rank)
    config = BrainConfig(embedding_dim=64, column_width=32, head_width=32)
    model = NeuroGen(config, vocab_size=VOCAB, mode="fused")
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
    precision = Precision(torch.device(device_of(world, "cuda")), "bfloat16")
    precision.place(model)
    update = CountedUpdate(
        model,
        build_optimizer(model, OPTIMIZERS[optimizer]),
        clip_norm=0.5,
        precision=precision,
        world=world,
        spread=world.spread(model),
    )
    assert can_record(update)
    take = RecordedUpdate(update) if recorded else update
    states: list[BrainState | None] = [None] * num_parts
    losses = []
    for step in range(NUM_STEPS):
        update.optimizer.set_rate_scale(0.5 + 0.05 * step)
        result = take(split_batch(make_batch(world.rank, step), num_parts), states)
        states = list(result.states)
        losses.append(torch.stack([result.loss.double(), result.grad_norm.double()]).cpu())
    found = {name: param.detach().cpu() for name, param in model.named_parameters()}
    if isinstance(take, RecordedUpdate):
        take.release()
    return found | {"losses": torch.stack(losses), "num_calls": torch.tensor(update.num_calls)}


def main(folder: Path) -> None:
    world = connect("ddp", "cuda")
    try:
        for name in CASES:
            for recorded in (False, True):
                kind = "recorded" if recorded else "plain"
                save_file(walk(world, name, recorded=recorded), folder / f"{world.rank}.{name}.{kind}.safetensors")
    finally:
        world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
