"""A table whose rows take their steps when they are needed, against the same table updated as a whole at every step."""

import pytest
import torch
from fused_checks import CompileCase, check_compiled

from kernels.adamw import AdamWOptions
from kernels.adamw.fused import describe, launch_all, make_table
from kernels.adamw.rows import RowSteps, catch_up, make_up, note
from kernels.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter computes bfloat16 wrongly
NUM_ROWS, WIDTH, NUM_IDS = 13, 20, 6


class Table:
    """A table with its optimiser's state; gradients, rates and verdicts by step, the same for every instance."""

    def __init__(self, options: AdamWOptions, moments: torch.dtype, grads: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.param = torch.randn(NUM_ROWS, WIDTH, generator=generator).to(DEVICE)
        self.grad = torch.zeros(NUM_ROWS, WIDTH, dtype=grads, device=DEVICE)
        self.averages = [torch.zeros_like(self.param, dtype=moments) for _ in range(2)]
        self.step, self.lr, self.scale, self.skip = (torch.zeros((), device=DEVICE) for _ in range(4))
        self.options, self.table = options, make_table([self.param])

    def arguments(self):
        tensors = [[self.param], [self.grad], [self.averages[0]], [self.averages[1]], [self.step], [None]]
        numbers = {"lr": self.lr, "grad_scale": self.scale, "skip": self.skip, "options": self.options}
        return (self.table, *tensors), numbers

    def learn(self, number: int, ids: torch.Tensor, *, skipped: bool) -> None:
        """What a backward pass and a verdict leave."""
        generator = torch.Generator().manual_seed(100 + number)
        rows = torch.randn(NUM_ROWS, WIDTH, generator=generator).to(self.grad)
        read = torch.isin(torch.arange(NUM_ROWS), ids).to(DEVICE)
        self.grad.copy_(torch.where(read[:, None], rows, 0.0))
        if skipped:
            self.grad[int(ids[ids >= 0][0])] = float("nan")
        self.lr.fill_(0.01 * number)
        self.scale.fill_(float("nan") if skipped else 1.0 / number)
        self.skip.fill_(float(skipped))

    def tensors(self):
        return [self.param, *self.averages, self.step]


def ids_of(number: int) -> torch.Tensor:
    """Some twice, some of no token, one outside the table; most rows are absent most of the time."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, NUM_ROWS, (NUM_IDS,), generator=generator)
    ids[1], ids[2], ids[3] = ids[0], -1, NUM_ROWS + 5 if number % 2 else ids[0]
    return ids


@pytest.mark.parametrize(
    ("num_kept", "moments", "grads", "decay"),
    [
        (1, torch.float32, torch.float32, 0.0),
        (3, torch.float32, HALF, 0.1),
        (4, HALF, HALF, 0.0),
        (16, HALF, torch.float32, 0.1),
    ],
    ids=str,
)
def test_rows_that_wait_end_with_the_bits_of_those_that_do_not(num_kept, moments, grads, decay):
    options = AdamWOptions(0.9, 0.95, 1e-8, decay)
    whole, rows = (Table(options, moments, grads) for _ in range(2))
    steps = RowSteps.new(NUM_ROWS, num_kept, torch.device(DEVICE))
    before = torch.full((NUM_IDS,), -1, dtype=torch.int64, device=DEVICE)
    tensors, numbers = rows.arguments()
    launch = describe(*tensors, **numbers)
    for number in range(1, 12):
        ids = ids_of(number)
        catch_up(steps, launch, WIDTH, before, ids.to(DEVICE))
        read = ids[(ids >= 0) & (ids < NUM_ROWS)].to(DEVICE)
        assert torch.equal(rows.param[read], whole.param[read]), number
        make_up(steps, launch, WIDTH, whole=False)
        for table in (whole, rows):
            table.learn(number, ids, skipped=number in (4, 5))
        before.copy_(ids)
        tensors, numbers = whole.arguments()
        launch_all(describe(*tensors, **numbers), tensors[1])
        note(steps, launch, rows.step)
        if number in (6, 11):  # somebody reads the whole
            catch_up(steps, launch, WIDTH, before, before)
            make_up(steps, launch, WIDTH, whole=True)
            for x, y in zip(rows.tensors(), whole.tensors(), strict=True):
                assert torch.equal(x, y), number
    assert float(rows.step) == 9.0
    assert int(steps.number) == 11


def test_rows_compile_for_the_gpus_they_are_meant_for():
    pointers = {"table_ptr": "*i64", "number_ptr": "*i32", "record_ptr": "*fp32", "taken_ptr": "*i32"}
    numbers = dict.fromkeys(("beta1", "beta2", "eps", "weight_decay"), "fp32") | {"num_rows": "i32"}
    catching = {**pointers, "before_ptr": "*i64", "now_ptr": "*i64", "num_ids": "i32", **numbers}
    shape = {"D": 1536, "K": 16, "BLOCK_D": 2048, "MOMENT": "tl.bfloat16"}
    noting = dict.fromkeys(("step_ptr", "record_ptr", "lr_ptr", "grad_scale_ptr", "skip_ptr"), "*fp32")
    betas = {"LOG_BETA1": -0.1, "LOG_BETA2": -0.05, "K": 16}
    check_compiled(
        [
            CompileCase("kernels.adamw.rows", "catch_up_kernel", catching, shape | {"GRAD": "tl.bfloat16"}, 8),
            CompileCase("kernels.adamw.rows", "make_up_kernel", {**pointers, **numbers}, shape | {"PARTS": 16}, 8),
            CompileCase("kernels.adamw.rows", "note_kernel", {**noting, "number_ptr": "*i32"}, betas, 1),
        ]
    )
