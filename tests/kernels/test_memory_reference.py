"""The memory's chunk-parallel definition against the recurrence it stands for, written token by token."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.memory import RULES, memory


def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forget_logit: Tensor,
    write_logit: Tensor | None,
    state: Tensor,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = lambda_t S_{t-1} + k_t v_t^T, or with beta_t k_t (v_t - lambda_t S_{t-1}^T k_t)^T; o_t = S_t^T q_t."""

    def unit(x: Tensor) -> Tensor:
        x = F.silu(x)
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    outputs = []
    for t in range(value.shape[1]):
        if document_start is not None:
            state = torch.where(document_start[:, t, None, None, None], torch.zeros_like(state), state)
        state = torch.sigmoid(forget_logit[:, t])[..., None, None] * state
        write = value[:, t]
        if write_logit is not None:
            expected = torch.einsum("bhkv,bhk->bhv", state, unit(key[:, t]))
            write = torch.sigmoid(write_logit[:, t])[..., None] * (write - expected)
        state = state + torch.einsum("bhk,bhv->bhkv", unit(key[:, t]), write)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, unit(query[:, t])))
    return torch.stack(outputs, 1), state


def draw(
    rule: str, num_lanes: int = 2, num_tokens: int = 23, num_heads: int = 2, width: int = 8
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = (normal(num_lanes, num_tokens, num_heads, width) for _ in range(3))
    forget_logit = 2.0 * normal(num_lanes, num_tokens, num_heads) + 1.0
    write_logit = normal(num_lanes, num_tokens, num_heads) if rule == "delta" else None
    return [query, key, value, forget_logit, write_logit, normal(num_lanes, num_heads, width, width)]


def window(arguments: list[Tensor | None], first: int, last: int) -> list[Tensor | None]:
    return [None if x is None else x[:, first:last] for x in arguments[:5]]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 23])
def test_equals_the_recurrence(rule: str, num_tokens: int) -> None:
    arguments = draw(rule, num_tokens=num_tokens)
    starts = torch.rand(2, num_tokens, generator=torch.Generator().manual_seed(0)) < 0.2
    for document_start in (None, starts):
        expected = recurrence(*arguments, document_start)
        for chunk_size in (1, 4, 64):
            actual = memory(*arguments, document_start, rule=rule, chunk_size=chunk_size)
            assert_close(actual[0], expected[0])
            assert_close(actual[1], expected[1])


@pytest.mark.parametrize("rule", RULES)
def test_gradients_equal_the_recurrence(rule: str) -> None:
    arguments = draw(rule)
    starts = torch.zeros(2, 23, dtype=torch.bool)
    starts[0, 9] = starts[1, 0] = starts[1, 17] = True
    grads = []
    for run in (lambda *x: recurrence(*x, starts), lambda *x: memory(*x, starts, rule=rule, chunk_size=8)):
        leaves = [None if x is None else x.clone().requires_grad_() for x in arguments]
        output, state = run(*leaves)
        loss = output.sin().sum() + state.cos().sum()
        grads.append(torch.autograd.grad(loss, [x for x in leaves if x is not None]))
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule: str) -> None:
    arguments = draw(rule, num_lanes=1, num_tokens=5, num_heads=1, width=3)
    starts = torch.tensor([[False, False, True, False, False]])
    leaves = [x.requires_grad_() for x in arguments if x is not None]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, state = tensors
        inputs = inputs if rule == "delta" else [*inputs, None]
        return memory(*inputs, state, starts, rule=rule, chunk_size=2)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cuts", [[11], [1, 2, 20], list(range(1, 23))])
def test_pieces_equal_the_whole(rule: str, cuts: list[int]) -> None:
    arguments = draw(rule)
    expected, expected_state = memory(*arguments, rule=rule, chunk_size=8)
    state, pieces = arguments[5], []
    for first, last in zip([0, *cuts], [*cuts, 23], strict=True):
        output, state = memory(*window(arguments, first, last), state, rule=rule, chunk_size=8)
        pieces.append(output)
    assert_close(torch.cat(pieces, 1), expected)
    assert_close(state, expected_state)


@pytest.mark.parametrize("rule", RULES)
def test_packed_documents_equal_separate_ones(rule: str) -> None:
    arguments = draw(rule, num_lanes=1)
    starts = torch.zeros(1, 23, dtype=torch.bool)
    starts[0, [6, 7, 20]] = True
    output, state = memory(*arguments, starts, rule=rule, chunk_size=8)
    fresh = torch.zeros_like(arguments[5])
    for first, last, before in ((0, 6, arguments[5]), (6, 7, fresh), (7, 20, fresh), (20, 23, fresh)):
        expected, last_state = memory(*window(arguments, first, last), before, rule=rule)
        assert_close(output[:, first:last], expected)
    assert_close(state, last_state)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("logit", [-100.0, 20.0])
def test_extreme_forgetting(rule: str, logit: float) -> None:
    arguments = draw(rule)
    arguments[3][:, 5:11] = logit
    leaves = [None if x is None else x.clone().requires_grad_() for x in arguments]
    output, state = memory(*leaves, rule=rule, chunk_size=16)
    expected, expected_state = recurrence(*arguments)
    assert_close(output, expected)
    assert_close(state, expected_state)
    (output.sum() + state.sum()).backward()
    assert all(x is None or x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("rule", RULES)
def test_no_tokens_leave_the_state(rule: str) -> None:
    arguments = draw(rule)
    output, state = memory(*window(arguments, 0, 0), arguments[5], rule=rule)
    assert output.shape == (2, 0, 2, 8)
    assert torch.equal(state, arguments[5])


@pytest.mark.parametrize(("rule", "with_write"), [("hebbian", True), ("delta", False), ("other", False)])
def test_refuses_what_has_no_meaning(rule: str, with_write: bool) -> None:
    arguments = draw("delta" if with_write else "hebbian")
    for backend in ("reference", "fused"):
        with pytest.raises(ValueError, match="rule"):
            memory(*arguments, rule=rule, backend=backend)
