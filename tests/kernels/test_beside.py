"""Weight gradients that are put off: the same numbers, and only where nobody reads them earlier."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from fused_checks import relative_error

from kernels.launch import INTERPRETED
from kernels.linear import beside, idle_gpu, product_gradients, sum_gradient, weight_gradients_beside
from kernels.linear.beside import PutOff, opened
from neurogen import NeuroGen

SIZES = {"embedding_dim": 32, "column_width": 16, "head_width": 16}


class _Affine(torch.autograd.Function):
    """h W^T + b, its gradients made as the circuits make theirs."""

    @staticmethod
    def forward(ctx, h, weight, bias):
        ctx.save_for_backward(h)
        ctx.weight, ctx.bias = weight, bias
        return h @ weight.t() + bias

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        (grad_weight,) = product_gradients([ctx.weight], grad.t(), h)
        return grad @ ctx.weight, grad_weight, sum_gradient(ctx.bias, grad)


def leaves(seed=0, *, width=6, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((5, width), (width, width), (width,))
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def here(weights):
    """The context as it is without a second stream."""
    return opened(PutOff(weights, torch.device("cpu"), None))


def loss_of(h, weight, bias):
    hidden = _Affine.apply(h, weight, bias)
    with idle_gpu():
        total = hidden.sin()
    return total.square().sum()


def test_gradients_are_the_same_and_come_when_the_context_ends():
    expected = leaves()
    loss_of(*expected).backward()
    got = leaves()
    with here(got[1:]):
        loss_of(*got).backward()
        assert got[0].grad is not None
        assert got[1].grad is got[2].grad is None
    for mine, theirs in zip(got, expected):
        assert torch.equal(mine.grad, theirs.grad)


def test_what_waits_begins_with_the_next_idle_launches():
    _, weight, bias = leaves()
    rows, order = torch.ones(3, 6), []
    put_off = PutOff([weight, bias], torch.device("cpu"), None)
    with opened(put_off):
        assert put_off.takes([bias], [rows])
        put_off.put([bias], torch.empty(6), lambda out: order.append("gradient"))
        with idle_gpu():
            order.append("scan")
        order.append("after")
    assert order == ["scan", "gradient", "after"]


def test_two_gradients_of_one_weight_are_added():
    h, weight, bias = leaves()
    with here([weight, bias]):
        (loss_of(h, weight, bias) + loss_of(2.0 * h, weight, bias)).backward()
    expected = leaves()
    (loss_of(*expected) + loss_of(2.0 * expected[0], *expected[1:])).backward()
    for mine, theirs in zip((weight, bias), expected[1:]):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("reason", ["gradient", "hook", "hook after", "not a leaf", "not named", "many rows"])
def test_gradients_that_somebody_reads_are_made_at_once(reason):
    h, weight, bias = leaves()
    named, seen = [weight], []
    if reason == "gradient":
        weight.grad = torch.ones_like(weight)
    elif reason == "hook":
        weight.register_hook(seen.append)
    elif reason == "hook after":
        weight.register_post_accumulate_grad_hook(seen.append)
    elif reason == "not named":
        named = []
    elif reason == "many rows":
        h = torch.zeros(beside._MIN_KEPT_BYTES, 6)
    used = 2.0 * weight if reason == "not a leaf" else weight
    with here([*named, used] if reason == "not a leaf" else named):
        _Affine.apply(h, used, bias).sum().backward()
        assert weight.grad is not None
    assert len(seen) == ("hook" in reason)


def test_weights_of_one_product_are_given_their_rows():
    first, second, a, b = torch.zeros(2, 4), torch.zeros(1, 4), torch.randn(8, 3), torch.randn(3, 4)
    weights = [first.requires_grad_(), second.requires_grad_()]
    at_once = product_gradients(weights, a, b)
    with here(weights):
        assert product_gradients(weights, a, b) == (None, None)
    for weight, expected in zip(weights, at_once):
        assert torch.equal(weight.grad, expected)


def test_an_error_closes_the_context():
    weight = leaves()[1]
    with pytest.raises(RuntimeError, match="multiplied"), here([weight]):
        product_gradients([weight], torch.ones(6, 3), torch.ones(2, 6))
    assert beside._open is None
    assert weight.grad is None


@pytest.mark.parametrize("named", [True, False])
def test_nothing_is_put_off_without_a_gpu(named):
    h, weight, bias = leaves()
    with weight_gradients_beside([weight, bias] if named else []):
        loss_of(h, weight, bias).backward()
        assert weight.grad is not None


@pytest.mark.skipif(not INTERPRETED, reason="in float32; tests/training/test_recorded.py has whole steps on a GPU")
@pytest.mark.parametrize("rule", ["hebbian", "delta"])
def test_a_whole_model_learns_the_same(rule, make_model: Callable[..., NeuroGen]):
    model = make_model(dtype=torch.float32, mode="fused", memory_rule=rule, **SIZES)
    ids = torch.randint(11, (2, 3), generator=torch.Generator().manual_seed(1))
    model(ids, target_ids=ids.roll(-1, 1)).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with here(model.parameters()):
        model(ids, target_ids=ids.roll(-1, 1)).loss.backward()
        late = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    projections = {name for name in expected if "proj.weight" in name}
    gates = {name for name in expected if any(part in name for part in (".forget.", ".write.", ".go."))}
    assert late == projections | gates != set()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.skipif(not beside.HOLDS_HALF_GRADIENTS, reason="this torch keeps gradients in their weight's type")
class TestHalfGradients:
    """float16 stands for any half precision: it can be multiplied here and in the interpreter."""

    def open(self, weights):
        return opened(PutOff(weights, torch.device("cpu"), None, half=torch.float16))

    def test_a_product_of_half_precision_is_rounded_once(self):
        weight, a, b = torch.zeros(3, 4, requires_grad=True), torch.randn(3, 8).half(), torch.randn(8, 4).half()
        with self.open([weight]):
            assert product_gradients([weight], a, b) == (None,)
        assert weight.grad.dtype == torch.float16
        torch.testing.assert_close(weight.grad.double(), a.double() @ b.double(), rtol=2**-11, atol=1e-3)

    def test_others_keep_their_type(self):
        _, weight, bias = leaves()
        rows = torch.randn(7, 6)
        with self.open([weight, bias]):
            product_gradients([weight], torch.randn(6, 7), rows)
            sum_gradient(bias, rows.half())
        assert weight.grad.dtype == bias.grad.dtype == torch.float32

    def test_a_second_gradient_is_added_in_float32(self):
        weight, a, b = torch.zeros(3, 4, requires_grad=True), torch.randn(3, 8).half(), torch.randn(8, 4).half()
        with self.open([weight]):
            product_gradients([weight], a, b)
            (weight * 2.0**-20).sum().backward()
        assert weight.grad.dtype == torch.float32
        torch.testing.assert_close(weight.grad, (a @ b).float() + 2.0**-20, rtol=0, atol=0)

    def test_the_next_gradient_may_be_float32_again(self):
        weight, a, b = torch.zeros(3, 4, requires_grad=True), torch.randn(3, 8).half(), torch.randn(8, 4).half()
        with self.open([weight]):
            product_gradients([weight], a, b)
        weight.grad = None
        (weight * 2.0**-20).sum().backward()
        assert weight.grad.dtype == torch.float32
        assert bool((weight.grad == 2.0**-20).all())

    def test_one_gradient_that_is_made_is_kept_and_a_second_is_autograds(self):
        weight, gradient = torch.zeros(3, 4, requires_grad=True), torch.randn(3, 4).half()
        with self.open([weight]):
            assert beside.handed_over(weight, gradient) is None
            second = beside.handed_over(weight, gradient)
            weight.backward(second)
        assert second.dtype == weight.grad.dtype == torch.float32
        assert torch.equal(weight.grad, 2.0 * gradient.float())
        late = beside.handed_over(weight, gradient)
        assert late.dtype == torch.float32

    def test_only_few_rows_are_stored_so(self, monkeypatch):
        monkeypatch.setattr(beside, "_MIN_KEPT_BYTES", 0)
        weight = torch.zeros(5, 4, requires_grad=True)
        with self.open([weight]):
            assert beside.stored_dtype(weight, torch.zeros(5, 4)) == torch.float16
            assert beside.stored_dtype(weight, torch.zeros(6, 4)) == torch.float32
            assert beside.stored_dtype(torch.zeros(5, 4), torch.zeros(5, 4)) == torch.float32
        assert beside.stored_dtype(weight, torch.zeros(5, 4)) == torch.float32

    @pytest.mark.skipif(not INTERPRETED, reason="in float32; tests/training/test_recorded.py has steps on a GPU")
    @pytest.mark.parametrize("tied", [False, True])
    def test_embedding_and_decoder_of_a_model(self, tied, make_model: Callable[..., NeuroGen]):
        model = make_model(dtype=torch.float32, mode="fused", tie_embedding=tied, **SIZES)
        ids = torch.randint(11, (1, 3), generator=torch.Generator().manual_seed(1))
        model(ids, target_ids=ids.roll(-1, 1)).loss.backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        with self.open(model.parameters()):
            model(ids, target_ids=ids.roll(-1, 1)).loss.backward()
        tables = {"embedding.weight"} | (set() if tied else {"decoder.weight"})
        for name, parameter in model.named_parameters():
            assert parameter.grad.dtype == (torch.float16 if name in tables and not tied else torch.float32), name
            assert relative_error(parameter.grad, expected[name]) < 2**-11, name


@pytest.mark.gpu
def test_gradients_on_a_second_stream_are_the_same_bits():
    results = []
    for context in (weight_gradients_beside, lambda weights: contextlib.nullcontext()):
        h, weight, bias = leaves(width=1024, device="cuda")
        main = torch.cuda.Stream(priority=-1)
        main.wait_stream(torch.cuda.current_stream())
        for _ in range(20):
            weight.grad = bias.grad = None
            with torch.cuda.stream(main), context([weight, bias]):
                loss = loss_of(h, weight, bias)
                with idle_gpu():
                    torch.cuda._sleep(100_000)
                loss.backward()
            with torch.cuda.stream(main):
                grads = [weight.grad.clone(), bias.grad.clone()]
        torch.cuda.synchronize()
        results.append(grads)
    for mine, theirs in zip(*results):
        assert torch.equal(mine, theirs)
