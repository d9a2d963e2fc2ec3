"""SwiGLU's activation: definition against its formula, launches against the definition."""

import math

import pytest
import torch
from fused_checks import CompileCase, check_compiled, poison_new_memory, relative_error

from kernels.swiglu import swiglu
from kernels.swiglu.fused import swiglu_backward, swiglu_forward


def test_formula():
    gate, value = [0.5, -2.0, 0.0], [3.0, 1.0, 7.0]
    expected = [g / (1 + math.exp(-g)) * v for g, v in zip(gate, value, strict=True)]
    out = swiglu(torch.tensor([gate + value], dtype=torch.float64))
    assert out.tolist() == [pytest.approx(expected)]


def test_reference_gradients():
    assert torch.autograd.gradcheck(swiglu, (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True),))


def check(shape, *, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(dtype)
    leaf, exact_leaf = (x.to(device, t).detach().requires_grad_() for t in (dtype, torch.float64))
    out, exact = swiglu(leaf, backend="fused"), swiglu(exact_leaf)
    out.backward(grad.to(device))
    exact.backward(grad.to(device, torch.float64))
    assert out.dtype == leaf.grad.dtype == dtype
    out_tolerance, grad_tolerance = (1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 2e-2)
    assert relative_error(out, exact) < out_tolerance
    assert relative_error(leaf.grad, exact_leaf.grad) < grad_tolerance


@pytest.mark.parametrize("shape", [(3, 7, 10), (1, 2), (5, 128), (2, 4098)], ids=str)
def test_matches_reference(shape, monkeypatch):
    poison_new_memory(monkeypatch)
    check(shape)


def test_large_gates_do_not_overflow():
    out = swiglu(torch.tensor([[80.0, -80.0, 2.0, 2.0]]), backend="fused")
    assert out.tolist() == [[160.0, pytest.approx(0.0, abs=1e-30)]]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=str)
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    swiglu(x, backend="fused").sum().backward()
    assert x.grad.shape == shape


def test_not_contiguous():
    x = torch.randn(6, 3).t()
    torch.testing.assert_close(swiglu(x, backend="fused"), swiglu(x))


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match="last dimension is 5"):
        swiglu(torch.zeros(2, 5), backend="fused")


def test_operators_are_well_formed():
    x = torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(swiglu_forward, (x,))
    torch.library.opcheck(swiglu_backward, (torch.randn(3, 2), x.detach()))


def test_no_spills():
    constants = {"F": 4096, "BLOCK": 2048}
    forward = {"input_ptr": "*bf16", "out_ptr": "*bf16"}
    backward = {"grad_out_ptr": "*bf16", "input_ptr": "*bf16", "grad_input_ptr": "*bf16"}
    module = "kernels.swiglu.fused"
    cases = [
        CompileCase(module, "swiglu_forward_kernel", forward, constants, 8),
        CompileCase(module, "swiglu_backward_kernel", backward, constants, 8),
    ]
    check_compiled(cases)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 256), (33, 127, 8192), (8, 4096, 704)], ids=str)
def test_on_gpu(shape, dtype):
    check(shape, dtype=dtype, device="cuda")
