"""One of two processes of tests/training/test_exchange.py: sums of gradients, and steps taken together (gloo, CPU).

What comes out is written as <rank>.<name>.safetensors. Test and processes share the definitions of this file.

Arguments: a folder to work in. RANK and MASTER_* are in the environment.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import neurogen.training.exchange as exchange
from neurogen import BrainConfig, NeuroGen
from neurogen.config.schema import AdamWConfig
from neurogen.data import Batch
from neurogen.training.distributed import World, connect
from neurogen.training.optimizer import build_optimizer
from neurogen.training.precision import Precision
from neurogen.training.update import Update, split_batch

LANES, WINDOW, VOCAB, NUM_STEPS = 8, 6, 11, 4
# Odd sizes, scalars and more than one bucket; the last two lack a gradient on one rank, and on both.
SHAPES = [(3,), (5, 7), (), (1, 33), (40, 33), (2, 3, 5), (4,), (9,)]
DTYPES = [torch.float32, torch.float64]


def make_params(rank: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters with a rank's gradients, every second one of them not contiguous."""
    generator = torch.Generator().manual_seed(rank)
    params = []
    for index, shape in enumerate(SHAPES):
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        grad = torch.randn(shape, dtype=dtype, generator=generator)
        if index % 2:
            grad = grad.transpose(0, -1).contiguous().transpose(0, -1)
        if index < len(SHAPES) - 1 - rank:
            param.grad = grad
        params.append(param)
    return params


def make_batch(step: int) -> Batch:
    """All lanes of a step; in step 1 the second half of them has no targets, in step 2 lanes have different numbers."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (LANES, WINDOW + 1), generator=generator)
    targets = ids[:, 1:].clone()
    if step == 1:
        targets[LANES // 2 :] = -100
    if step == 2:
        targets[torch.rand(targets.shape, generator=generator) < 0.4] = -100
    return Batch(ids[:, :-1], targets, torch.zeros(LANES, WINDOW, dtype=torch.bool))


def take_steps(world: World, *, num_parts: int) -> dict[str, torch.Tensor]:
    """Parameters after NUM_STEPS steps, and what each of them measured; models begin differently on every rank."""
    torch.manual_seed(world.rank)
    config = BrainConfig(embedding_dim=16, column_width=8, head_width=8, chunk_size=4)
    model = NeuroGen(config, vocab_size=VOCAB, mode="unfused")
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    precision = Precision(torch.device("cpu"), "float64")
    precision.place(model)
    spread = world.spread(model)
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-2))
    update = Update(model, optimizer, clip_norm=0.5, precision=precision, world=world, spread=spread)
    measured, states = [], [None] * num_parts
    for step in range(NUM_STEPS):
        own = split_batch(make_batch(step), world.size)[world.rank]
        result = update(split_batch(own, num_parts), states)
        states = list(result.states)
        numbers = [result.loss, result.num_correct, result.grad_norm, result.skipped]
        measured.append(torch.tensor([result.num_targets, *map(float, numbers)], dtype=torch.float64))
    return {"measured": torch.stack(measured)} | {name: param.detach() for name, param in model.named_parameters()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = connect("ddp", "cpu")
    try:
        with_bytes, exchange.BUCKET_BYTES = exchange.BUCKET_BYTES, 512
        for dtype in DTYPES:
            params = make_params(world.rank, dtype)
            exchange.sum_gradients(params)
            assert all(param.grad.is_contiguous() and param.grad.data_ptr() % 16 == 0 for param in params)
            sums = {str(index): param.grad for index, param in enumerate(params)}
            save_file(sums, folder / f"{world.rank}.{dtype}.safetensors")
        exchange.BUCKET_BYTES = with_bytes
        agreed = [world.all_agree(opinion) for opinion in (True, False, world.is_main)]
        assert agreed == [True, False, False], agreed
        calls = []
        all_reduce = dist.all_reduce
        dist.all_reduce = lambda tensor, *args: calls.append(tensor.numel()) or all_reduce(tensor, *args)
        for num_parts in (1, 2):
            save_file(take_steps(world, num_parts=num_parts), folder / f"{world.rank}.parts{num_parts}.safetensors")
        # A step's number of targets, its gradients, and what it measured: once each, however many parts it has.
        assert len(calls) == 3 * NUM_STEPS * 2, calls
    finally:
        world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
