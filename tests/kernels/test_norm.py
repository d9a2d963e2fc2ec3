"""Residual addition and RMS normalisation: definition against its formula, launches against the definition."""

import math

import pytest
import torch
from fused_checks import CompileCase, check_compiled, poison_new_memory, relative_error

from kernels.norm import add_norm
from kernels.norm.fused import add_norm_backward, add_norm_forward

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2)}


def make_inputs(shape, *, with_delta=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, delta, grad_total, grad_normed = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    return x, delta if with_delta else None, grad_total, grad_normed


def test_formula():
    x, delta, _, _ = make_inputs((2, 5))
    out = add_norm(x, delta)
    for lane in range(2):
        total = [a + b for a, b in zip(x[lane].tolist(), delta[lane].tolist(), strict=True)]
        rms = math.sqrt(sum(t * t for t in total) / 5 + 1e-6)
        assert out.total[lane].tolist() == pytest.approx(total)
        assert out.normed[lane].tolist() == pytest.approx([t / rms for t in total])


def test_reference_gradients():
    x, delta, _, _ = make_inputs((2, 3))
    assert torch.autograd.gradcheck(lambda a, b: tuple(add_norm(a, b)), (x.requires_grad_(), delta.requires_grad_()))


def run(backend, inputs, *, dtype, device="cpu", out_dtype=None, use_total=True):
    x, delta, grad_total, grad_normed = (None if z is None else z.to(device, dtype) for z in inputs)
    leaves = [z.detach().requires_grad_() for z in (x, delta) if z is not None]
    total, normed = add_norm(*leaves, backend=backend, out_dtype=out_dtype)
    outputs, grads = [normed], [grad_normed.to(normed.dtype)]
    if use_total:
        outputs, grads = [*outputs, total], [*grads, grad_total]
    return total, normed, *torch.autograd.grad(outputs, leaves, grads)


def check(shape, *, dtype=torch.float32, device="cpu", with_delta=True, use_total=True):
    inputs = [None if z is None else z.to(dtype) for z in make_inputs(shape, with_delta=with_delta)]
    results = run("fused", inputs, dtype=dtype, device=device, use_total=use_total)
    expected = run("reference", inputs, dtype=torch.float64, device=device, use_total=use_total)
    assert len(results) == len(expected) == (4 if with_delta else 3)
    for i, (actual, exact) in enumerate(zip(results, expected, strict=True)):
        assert actual.dtype == dtype
        assert relative_error(actual, exact) < TOLERANCES[dtype][i > 1]


@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1), (70, 64), (2, 1536), (1, 4100), (9, 1)], ids=str)
def test_matches_reference(shape, with_delta, monkeypatch):
    poison_new_memory(monkeypatch)
    check(shape, with_delta=with_delta)


def test_only_normed_is_used():
    check((3, 5), use_total=False)


def test_only_total_is_used():
    x, delta, grad_total, _ = (z.float() for z in make_inputs((3, 5)))
    total, _ = add_norm(x.requires_grad_(), delta, backend="fused")
    assert torch.equal(torch.autograd.grad(total, x, grad_total)[0], grad_total)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=str)
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    out = add_norm(x, torch.zeros(shape), backend="fused")
    out.normed.sum().backward()
    assert out.total.shape == out.normed.shape == x.grad.shape == shape


def test_types():
    x, delta = torch.randn(3, 8), torch.randn(3, 8).half()
    delta.requires_grad_()
    out, expected = (add_norm(x, delta, out_dtype=torch.float16, backend=b) for b in ("fused", "reference"))
    assert (out.total.dtype, out.normed.dtype) == (torch.float32, torch.float16)
    assert relative_error(out.normed, expected.normed) < 1e-3
    assert torch.autograd.grad(out.total.sum(), delta)[0].dtype == torch.float16


def test_the_gradient_of_a_half_precision_delta_is_the_workspace_gradient_rounded_once():
    x, delta, grad_total, grad_normed = (z.float() for z in make_inputs((3, 8)))
    leaves = x.requires_grad_(), delta.half().requires_grad_()
    outputs = add_norm(*leaves, backend="fused")
    grad_x, grad_delta = torch.autograd.grad(outputs, leaves, (grad_total, grad_normed))
    assert torch.equal(grad_delta, grad_x.half())


def test_not_contiguous():
    x, delta = torch.randn(8, 3).t(), torch.randn(8, 3).t()
    for actual, expected in zip(add_norm(x, delta, backend="fused"), add_norm(x, delta), strict=True):
        torch.testing.assert_close(actual, expected)


def test_operators_are_well_formed():
    x, delta = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    torch.library.opcheck(add_norm_forward, (x, delta, 1e-6, torch.float32))
    torch.library.opcheck(add_norm_backward, (delta, delta, x.detach(), torch.ones(3), torch.float32, torch.float16))


def test_no_spills():
    rest = {"normed_ptr": "*bf16", "inverse_rms_ptr": "*fp32", "num_rows": "i32"}
    forward = {"x_ptr": "*fp32", "delta_ptr": "*bf16", "total_ptr": "*fp32", "eps": "fp32"}
    backward = {"grad_total_ptr": "*fp32", "grad_normed_ptr": "*bf16", "grad_x_ptr": "*fp32", "grad_delta_ptr": "*bf16"}
    both = {"HAS_GRAD_TOTAL": True, "HAS_GRAD_DELTA": True}
    tile = {"D": 1536, "BLOCK_R": 2, "BLOCK_D": 2048}
    module = "kernels.norm.fused"
    cases = [
        CompileCase(module, "add_norm_forward_kernel", forward | rest, tile | {"HAS_DELTA": True}, 8),
        CompileCase(module, "add_norm_backward_kernel", backward | rest, tile | both, 8),
    ]
    check_compiled(cases)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 128), (33, 127, 1536), (8, 4096, 512), (3, 5, 8192)], ids=str)
def test_on_gpu(shape, dtype):
    check(shape, dtype=dtype, device="cuda")
    check(shape, dtype=dtype, device="cuda", with_delta=False)
