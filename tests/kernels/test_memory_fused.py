"""The memory's Triton kernels against its definition in float64."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from kernels.launch import INTERPRETED
from kernels.memory import RULES, call, memory
from kernels.memory.fused import memory_backward, memory_backward_into, memory_forward

DEVICE = "cpu" if INTERPRETED else "cuda"
# Norm of the difference over the norm of the float64 result: outputs, gradients.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2)}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that whatever a kernel forgets to write is seen."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args, **kwargs) -> Tensor:
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


def draw(
    rule: str,
    num_lanes: int,
    num_tokens: int,
    num_heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
) -> list[Tensor | None]:
    """Inputs as a model gives them: query, key and value are strided views of one projection."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    wide = normal(num_lanes, num_tokens, 3 * num_heads * width).to(dtype)
    query, key, value = (x.unflatten(-1, (num_heads, width)) for x in wide.chunk(3, dim=-1))
    # Half-lives from a token to thousands, as the regions start with.
    forget_logit = (3.0 * normal(num_lanes, num_tokens, num_heads) + 3.0).to(dtype)
    write_logit = normal(num_lanes, num_tokens, num_heads).to(dtype) if rule == "delta" else None
    return [query, key, value, forget_logit, write_logit, normal(num_lanes, num_heads, width, width)]


def draw_starts(num_lanes: int, num_tokens: int, probability: float = 0.1) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(1)
    return torch.rand(num_lanes, num_tokens, generator=generator, device=DEVICE) < probability


def evaluate(
    arguments: list[Tensor | None],
    document_start: Tensor | None,
    *,
    rule: str,
    backend: str,
    dtype: torch.dtype | None = None,
    with_state_grad: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a random linear function of them."""
    leaves = [None if x is None else x.to(dtype or x.dtype).detach().requires_grad_() for x in arguments]
    output, state = memory(*leaves, document_start, rule=rule, backend=backend)
    generator = torch.Generator(DEVICE).manual_seed(2)
    loss = 0.0
    for result in (output, state)[: 1 + with_state_grad]:
        weight = torch.randn(result.shape, generator=generator, device=DEVICE)
        # The gradient that reaches the kernels is of the outputs' type; both sides are given the same numbers.
        weight = weight.to(arguments[2].dtype if result is output else torch.float32)
        loss = loss + (result * weight.to(result.dtype)).sum()
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return [output.detach(), state.detach()], list(grads)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.isfinite().all()
    difference = (actual.double() - expected).norm()
    return float(difference / expected.norm()) if expected.any() else float(difference)


def check(
    arguments: list[Tensor | None], document_start: Tensor | None, *, rule: str, with_state_grad: bool = True
) -> None:
    """Compare the fused op with the reference in float64, output by output and gradient by gradient."""
    outputs, grads = evaluate(arguments, document_start, rule=rule, backend="fused", with_state_grad=with_state_grad)
    expected_outputs, expected_grads = evaluate(
        arguments,
        document_start,
        rule=rule,
        backend="reference",
        dtype=torch.float64,
        with_state_grad=with_state_grad,
    )
    output_tolerance, grad_tolerance = TOLERANCE[arguments[2].dtype]
    for name, actual, expected in zip(("output", "state"), outputs, expected_outputs, strict=True):
        assert relative_error(actual, expected) < output_tolerance, name
    names = [n for n, x in zip(("query", "key", "value", "forget", "write", "state"), arguments) if x is not None]
    for name, actual, expected in zip(names, grads, expected_grads, strict=True):
        assert relative_error(actual, expected) < grad_tolerance, name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("num_lanes", "num_tokens", "num_heads", "width"),
    [(1, 1, 1, 16), (2, 16, 1, 16), (2, 37, 2, 16), (2, 33, 1, 32), (1, 33, 1, 32), (1, 20, 1, 64), (1, 100, 1, 16)],
)
def test_agrees_with_float64(rule: str, num_lanes: int, num_tokens: int, num_heads: int, width: int) -> None:
    arguments = draw(rule, num_lanes, num_tokens, num_heads, width)
    check(arguments, None, rule=rule)
    check(arguments, draw_starts(num_lanes, num_tokens), rule=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_lanes", [1, 2])
def test_agrees_at_the_widest_head(rule: str, num_lanes: int) -> None:
    check(draw(rule, num_lanes, 18, 1, 128), draw_starts(num_lanes, 18), rule=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_lanes", [1, 2])
def test_final_state_without_a_gradient(rule: str, num_lanes: int) -> None:
    check(draw(rule, num_lanes, 19, 1, 16), None, rule=rule, with_state_grad=False)


def test_chunks_in_parallel_agree_with_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream is few enough for the interpreter's two multiprocessors."""
    arguments, starts = draw("hebbian", 1, 70, 1, 16), draw_starts(1, 70)
    parallel = evaluate(arguments, starts, rule="hebbian", backend="fused")
    monkeypatch.setattr(call, "PARALLEL", False)
    walked = evaluate(arguments, starts, rule="hebbian", backend="fused")
    for x, y in zip(parallel[0] + parallel[1], walked[0] + walked[1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_gradient_of_the_final_state_alone(rule: str) -> None:
    grads = []
    for backend, dtype in (("fused", torch.float32), ("reference", torch.float64)):
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in draw(rule, 1, 21, 1, 16)]
        _, state = memory(*leaves, rule=rule, backend=backend)
        tensors = [x for x in leaves[1:] if x is not None]
        grads.append(torch.autograd.grad(state.sin().sum(), tensors))
    for actual, expected in zip(*grads, strict=True):
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_pieces_equal_the_whole(rule: str) -> None:
    arguments = draw(rule, 2, 37, 1, 16)
    starts = draw_starts(2, 37)
    expected, expected_state = memory(*arguments, starts, rule=rule, backend="fused")
    state, pieces = arguments[5], []
    for first, last in ((0, 1), (1, 20), (20, 37)):
        window = [None if x is None else x[:, first:last] for x in arguments[:5]]
        output, state = memory(*window, state, starts[:, first:last], rule=rule, backend="fused")
        pieces.append(output)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("logit", [-100.0, 20.0])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's exp2 of a large number is infinite
def test_extreme_forgetting(rule: str, logit: float) -> None:
    arguments = draw(rule, 1, 36, 1, 16)
    arguments[3][:, 3:30] = logit
    check(arguments, None, rule=rule)


def test_decay_after_much_forgetting_is_exact() -> None:
    """Tokens that forget everything must not cost the ones after them in the chunk their digits."""
    arguments = draw("hebbian", 1, 16, 1, 16)
    arguments[3][:, :12] = -60.0
    arguments[3][:, 12:] = 6.0
    check(arguments, None, rule="hebbian")


def test_repeated_keys_keep_the_delta_rule_stable() -> None:
    """All keys equal and beta near one is where powers of the triangular system grow fastest."""
    arguments = draw("delta", 1, 48, 1, 16)
    arguments[1] = arguments[1][:, :1].expand(-1, 48, -1, -1).contiguous()
    arguments[4] = torch.full_like(arguments[4], 8.0)
    arguments[3] = torch.full_like(arguments[3], 9.0)
    check(arguments, None, rule="delta")


@pytest.mark.parametrize("rule", RULES)
def test_no_tokens_leave_the_state(rule: str) -> None:
    arguments = draw(rule, 2, 3, 1, 16)
    empty = [None if x is None else x[:, :0] for x in arguments[:5]]
    output, state = memory(*empty, arguments[5], rule=rule, backend="fused")
    assert output.shape == (2, 0, 1, 16)
    assert torch.equal(state, arguments[5])


@pytest.mark.parametrize("rule", RULES)
def test_layouts_do_not_matter(rule: str) -> None:
    arguments = draw(rule, 2, 17, 2, 16)
    expected = memory(*arguments, rule=rule, backend="fused")
    shuffled = [
        None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) if i < 5 else x
        for i, x in enumerate(arguments)
    ]
    shuffled[0] = shuffled[0].transpose(-1, -2).contiguous().transpose(-1, -2)  # last dimension not contiguous: copied
    shuffled[5] = arguments[5].transpose(-1, -2).contiguous().transpose(-1, -2)
    actual = memory(*shuffled, rule=rule, backend="fused")
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("rule", RULES)
def test_gradients_go_into_parts_of_one_tensor(rule: str) -> None:
    arguments = [*draw(rule, 2, 37, 2, 16), draw_starts(2, 37)]
    output, _, inverse = memory_forward(*arguments, 1e-6)
    expected = memory_backward(*arguments, inverse, output, None, 1e-6)
    wide = torch.empty(2, 37, 4 * 32)
    parts = tuple(x.unflatten(-1, (2, 16)) for x in wide.chunk(4, dim=-1))
    others = memory_backward_into(*arguments, inverse, output, None, 1e-6, out=parts[:3])
    for actual, wanted in zip((*parts[:3], *others), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert parts[3].isnan().all()
    with pytest.raises(ValueError, match="equal strides"):
        memory_backward_into(*arguments, inverse, output, None, 1e-6, out=(*parts[:2], parts[2].contiguous()))


def test_refuses_by_name() -> None:
    arguments = draw("hebbian", 1, 4, 1, 16)
    with pytest.raises(ValueError, match="head width is 24"):
        memory(*[torch.zeros(1, 4, 1, 24)] * 3, arguments[3].cpu(), None, torch.zeros(1, 1, 24, 24), backend="fused")
    with pytest.raises(ValueError, match=r"query, key and value are|float64"):
        memory(arguments[0].double(), *arguments[1:], backend="fused")


@pytest.mark.parametrize("rule", RULES)
def test_operator_is_registered_soundly(rule: str) -> None:
    arguments = draw(rule, 1, 18, 1, 16)
    leaves = [None if x is None else x.clone().requires_grad_() for x in arguments]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(memory_forward, (*leaves, draw_starts(1, 18), 1e-6), test_utils=tests)


@pytest.mark.parametrize("rule", RULES)
def test_traces_with_symbolic_shapes(rule: str) -> None:
    """Sizes that are symbols cannot be looked up in the launch table as they are."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def symbolic(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * x.dim())
        return mode.from_tensor(x, symbolic_context=context)

    arguments = [symbolic(x) for x in draw(rule, 2, 100, 2, 64, torch.bfloat16)]
    with mode:
        output, state, inverse = memory_forward(*arguments, None, 1e-6)
        grads = memory_backward(*arguments, None, inverse, output, None, 1e-6)
    assert output.shape[-1] == 64
    assert state.dtype == torch.float32
    assert len(grads) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("num_lanes", "num_tokens"),
    [(1, 1), (1, 63), (1, 500), (5, 300), (33, 65), (2, 127), (33, 1000), (1, 4096), (33, 4096)],
)
def test_grid_on_a_gpu(rule: str, dtype: torch.dtype, width: int, num_lanes: int, num_tokens: int) -> None:
    num_heads = 2 if num_lanes * num_tokens > 50_000 else 12
    arguments = draw(rule, num_lanes, num_tokens, num_heads, width, dtype)
    check(arguments, None, rule=rule)
    check(arguments, draw_starts(num_lanes, num_tokens, 0.005), rule=rule)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_same_bits_twice_on_a_gpu(rule: str) -> None:
    arguments = draw(rule, 8, 777, 12, 128, torch.bfloat16)
    first = evaluate(arguments, None, rule=rule, backend="fused")
    second = evaluate(arguments, None, rule=rule, backend="fused")
    for x, y in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_walks_side_by_side_change_no_bit(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = draw(rule, 1, 777, 12, 128, torch.bfloat16)
    first = evaluate(arguments, None, rule=rule, backend="fused")
    monkeypatch.setattr("kernels.memory.fused.alongside", lambda *_, **__: contextlib.nullcontext(lambda: None))
    second = evaluate(arguments, None, rule=rule, backend="fused")
    for x, y in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_graph_replays_on_a_gpu(rule: str) -> None:
    """A captured forward and backward pass gives, on new inputs, what an eager one gives."""
    static = [None if x is None else x.clone().requires_grad_() for x in draw(rule, 2, 200, 2, 64, torch.bfloat16)]
    tensors = [x for x in static if x is not None]

    def step() -> list[Tensor]:
        output, state = memory(*static, rule=rule, backend="fused")
        return [output, state, *torch.autograd.grad(output.float().square().sum() + state.square().sum(), tensors)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x, y in zip(static, draw(rule, 2, 200, 2, 64, torch.bfloat16, seed=5), strict=True):
            if x is not None:
                x.copy_(y)
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_compiles_on_a_gpu(rule: str) -> None:
    arguments = draw(rule, 2, 100, 2, 64, torch.bfloat16)
    leaves = [None if x is None else x.clone().requires_grad_() for x in arguments]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(memory_forward, (*leaves, None, 1e-6), test_utils=tests, rtol=2e-2, atol=2e-2)
