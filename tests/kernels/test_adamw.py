"""One launch of AdamW over several parameters against its formula and torch's own, and as an optimiser."""

import pytest
import torch
from fused_checks import amid_nan, is_amid_nan, relative_error

from kernels.adamw import AdamWOptions, adamw_reference
from kernels.adamw.fused import describe, launch_all, make_table
from kernels.launch import INTERPRETED
from neurogen.training.adamw import FusedAdamW

DEVICE = "cpu" if INTERPRETED else "cuda"
OPTIONS = AdamWOptions(0.9, 0.99, 1e-8, 0.1)
SHAPES = [(3, 8), (2052,), (64, 68), (1,)]  # less than a block, a little more, several blocks, one number


def number(value):
    return torch.tensor(value, device=DEVICE)


def take_step(table, params, *rest, **numbers):
    launch_all(describe(table, params, *rest, **numbers), params)


def make_parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    params, grads, averages = ([normal(shape) for shape in SHAPES] for _ in range(3))
    squares = [normal(shape).square() for shape in SHAPES]
    return params, grads, averages, squares


@pytest.mark.parametrize("half_grads", [(), (0, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("copy_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1.0, 1000.0])
def test_formula(count, copy_dtype, half_grads):
    tensors = make_parameters()
    for index in half_grads:
        tensors[1][index] = tensors[1][index].half()
    expected = [[x.double() for x in kind] for kind in tensors]
    steps = [number(count - 1.0) for _ in SHAPES]
    rounded = [None, torch.zeros(SHAPES[1], dtype=copy_dtype, device=DEVICE), None, None]
    take_step(
        make_table(tensors[0]),
        *tensors,
        steps,
        rounded,
        lr=number(3e-2),
        grad_scale=number(0.25),
        skip=number(0.0),
        options=OPTIONS,
    )
    for param, grad, avg, avg_sq in zip(*expected):
        adamw_reference(
            param, grad, avg, avg_sq, torch.tensor(count).double(), lr=3e-2, grad_scale=0.25, options=OPTIONS
        )
    for kind, exact in zip(tensors, expected):
        for x, y in zip(kind, exact):
            assert relative_error(x, y) < 1e-6
    assert torch.equal(rounded[1], tensors[0][1].to(copy_dtype))
    assert [float(step) for step in steps] == [count] * len(SHAPES)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_beside_the_tensors_is_touched(grad_dtype):
    """The launch reads and writes four numbers at a time only where there are four."""
    sizes = (1, 2, 3, 5, 1023, 2052)
    tensors = [[amid_nan(torch.rand(size, device=DEVICE)) for size in sizes] for _ in range(4)]
    tensors[1] = [amid_nan(grad.to(grad_dtype)) for grad in tensors[1]]
    copies = [amid_nan(torch.rand(size, device=DEVICE).half()) for size in sizes]
    expected = [[x.double().clone() for x in kind] for kind in tensors]
    take_step(
        make_table(tensors[0]),
        *tensors,
        [number(0.0) for _ in sizes],
        copies,
        lr=number(3e-2),
        grad_scale=number(0.25),
        skip=number(0.0),
        options=OPTIONS,
    )
    for each in zip(*expected):
        adamw_reference(*each, torch.tensor(1.0).double(), lr=3e-2, grad_scale=0.25, options=OPTIONS)
    for kind, exact in zip(tensors, expected):
        for x, y in zip(kind, exact):
            assert relative_error(x, y) < 1e-6
            assert is_amid_nan(x)
    for copy, param in zip(copies, tensors[0]):
        assert torch.equal(copy, param.half())
        assert is_amid_nan(copy)


def test_moments_in_half_precision_are_rounded_and_nothing_else():
    params, grads, averages, squares = make_parameters()
    averages, squares = ([x.half() for x in kind] for kind in (averages, squares))
    expected = [[x.double() for x in kind] for kind in (params, grads, averages, squares)]
    take_step(
        make_table(params),
        params,
        grads,
        averages,
        squares,
        [number(9.0) for _ in SHAPES],
        [None] * len(SHAPES),
        lr=number(3e-2),
        grad_scale=number(0.25),
        skip=number(0.0),
        options=OPTIONS,
    )
    for each in zip(*expected):
        adamw_reference(*each, torch.tensor(10.0).double(), lr=3e-2, grad_scale=0.25, options=OPTIONS)
    for x, y in zip(params, expected[0]):
        assert relative_error(x, y) < 1e-6  # made from moments in float32
    for x, y in zip((*averages, *squares), (*expected[2], *expected[3])):
        assert x.dtype == torch.float16
        torch.testing.assert_close(x.cpu().double(), y.cpu(), rtol=2**-10, atol=2**-24)


def test_the_reference_is_torchs_adamw():
    param = torch.randn(5, 3, dtype=torch.float64)
    own, theirs = param.clone(), param.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    averages = torch.zeros_like(own), torch.zeros_like(own)
    for step in range(1, 4):
        theirs.grad = torch.randn(5, 3, dtype=torch.float64)
        adamw_reference(
            own,
            theirs.grad,
            *averages,
            torch.tensor(step, dtype=torch.float64),
            lr=0.01,
            grad_scale=1.0,
            options=OPTIONS,
        )
        optimizer.step()
    torch.testing.assert_close(own, theirs.detach(), rtol=1e-12, atol=1e-12)


def test_skipping_leaves_everything():
    tensors = make_parameters()
    steps = [number(1.0) for _ in SHAPES]
    before = [[x.clone() for x in kind] for kind in tensors]
    take_step(
        make_table(tensors[0]),
        *tensors,
        steps,
        [None] * len(SHAPES),
        lr=number(1.0),
        grad_scale=number(float("nan")),
        skip=number(1.0),
        options=OPTIONS,
    )
    assert all(torch.equal(x, y) for kind, same in zip(tensors, before) for x, y in zip(kind, same))
    assert [float(step) for step in steps] == [1.0] * len(SHAPES)


def test_what_the_launch_would_misread_is_refused():
    params, grads, averages, squares = make_parameters()
    misaligned = torch.randn(25, device=DEVICE)[1:].view(3, 8)
    for wrong in (grads[0].double(), grads[0].t(), misaligned, misaligned.half().t()):
        with pytest.raises(ValueError, match=r"contiguous float32|float64"):
            take_step(
                make_table(params),
                params,
                [wrong, *grads[1:]],
                averages,
                squares,
                [number(1.0)] * len(SHAPES),
                [None] * len(SHAPES),
                lr=number(1.0),
                grad_scale=number(1.0),
                skip=number(0.0),
                options=OPTIONS,
            )


def test_as_an_optimizer_it_walks_with_torchs():
    params, *_ = make_parameters()
    own = [param.clone().requires_grad_() for param in params]
    theirs = [param.double().requires_grad_() for param in params]
    groups = [[0, 2], [1, 3]]
    optimizer = FusedAdamW(
        [{"params": [own[i] for i in group], "weight_decay": 0.1 * n} for n, group in enumerate(groups)],
        0.02,
        betas=(0.9, 0.99),
        eps=1e-8,
    )
    reference = torch.optim.AdamW(
        [{"params": [theirs[i] for i in group], "weight_decay": 0.1 * n} for n, group in enumerate(groups)],
        lr=0.02,
        betas=(0.9, 0.99),
        eps=1e-8,
    )
    for step in range(4):
        _, grads, *_ = make_parameters(seed=step + 1)
        optimizer.found_inf = number(float(step == 2))
        optimizer.grad_factor = number(0.5)
        for x, y, grad in zip(own, theirs, grads):
            x.grad, y.grad = grad, 0.5 * grad.double()
        version = own[0]._version
        optimizer.step()
        assert own[0]._version > version  # what is kept of the old value is known to be old
        if step != 2:
            reference.step()
    for x, y in zip(own, theirs):
        assert relative_error(x, y) < 1e-6
        assert float(optimizer.state[x]["step"]) == 3.0
    names = {"step", "exp_avg", "exp_avg_sq"}
    assert all(set(optimizer.state[x]) == set(reference.state[y]) == names for x, y in zip(own, theirs))


def test_an_optimizer_keeps_its_moments_as_told():
    weight = torch.randn(4, 4, device=DEVICE, requires_grad=True)
    optimizer = FusedAdamW([weight], 0.1, betas=(0.9, 0.95), eps=1e-8, moments=torch.float16)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    assert {key: value.dtype for key, value in state.items()} == {
        "step": torch.float32, "exp_avg": torch.float16, "exp_avg_sq": torch.float16,
    }  # fmt: skip
    torch.testing.assert_close(state["exp_avg"], torch.full_like(weight, 0.1).half())


def test_a_gradient_that_lies_behind_two_numbers():
    """In one buffer, one after another."""
    walks = []
    for first in (0, 2):
        weight = torch.ones(3, 4, device=DEVICE, requires_grad=True)
        weight.grad = torch.arange(14.0, device=DEVICE)[first : first + 12].view(3, 4).sub(first)
        bucket = torch.cat([torch.zeros(first, device=DEVICE), weight.grad.flatten()])
        weight.grad = bucket[first:].view(3, 4)
        assert bool(weight.grad.data_ptr() % 16) == bool(first)
        FusedAdamW([weight], 0.1, betas=(0.9, 0.99), eps=1e-8).step()
        walks.append(weight.detach())
    assert torch.equal(*walks)
    assert float((walks[0] - 1.0).abs().max()) > 0.05


def test_copies_are_written_and_said_to_be():
    weight = torch.randn(4, 4, device=DEVICE, requires_grad=True)
    copy, said = torch.zeros(4, 4, dtype=torch.float16, device=DEVICE), []
    optimizer = FusedAdamW(
        [weight], 0.1, betas=(0.9, 0.99), eps=1e-8, copies=lambda: ({weight: copy}, lambda: said.append(1))
    )
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(copy, weight.detach().half())
    assert said == [1]


@pytest.mark.gpu
def test_recorded_steps_are_plain_steps():
    """A graph of backward and step, replayed, walks with the same steps launched one by one, plain ones in between."""
    torch.manual_seed(0)
    walks = []
    for recorded in (False, True):
        weight = torch.ones(300, 40, device="cuda", requires_grad=True)
        x = torch.linspace(-1, 1, 40, device="cuda")
        optimizer = FusedAdamW([weight], 0.1, betas=(0.9, 0.99), eps=1e-8)
        optimizer.param_groups[0]["lr"] = number(0.1)

        def step(weight=weight, x=x, optimizer=optimizer):
            weight.grad = None
            (weight @ x).square().sum().backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.synchronize()
        run = step
        if recorded:
            optimizer.prepare_recording()
            graph = torch.cuda.CUDAGraph()
            weight.grad = None
            with torch.cuda.graph(graph, stream=stream):
                step()
            optimizer.finish_recording()
            run = graph.replay
        for run_one in (run, run, step, run):
            run_one()
        walks.append(weight.detach().clone())
    assert torch.equal(*walks)
