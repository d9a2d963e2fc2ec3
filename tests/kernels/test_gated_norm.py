"""The gated norm: its definition, and its Triton kernels against it in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gated_norm import gated_norm
from kernels.gated_norm.fused import gated_norm_forward
from kernels.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2)}


def draw(*shape: int, group_size: int, with_scale: bool, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """x, a gate that is half of a wider projection, and a scale."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    *leading, width = shape
    gate = normal(*leading, 2 * width)[..., width:]
    scale = torch.sigmoid(normal(*leading, width // group_size)) if with_scale else None
    return [normal(*shape), gate, scale]


def evaluate(arguments: list[Tensor | None], *, group_size: int, backend: str, dtype: torch.dtype) -> list[Tensor]:
    x, gate, scale = (None if x is None else x.to(dtype).detach().requires_grad_() for x in arguments)
    y = gated_norm(x, gate, group_size=group_size, scale=scale, backend=backend)
    weight = torch.randn(y.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    weight = weight.to(arguments[0].dtype).to(y.dtype)
    grads = torch.autograd.grad((y * weight).sum(), [x for x in (x, gate, scale) if x is not None])
    return [y.detach(), *grads]


def check(arguments: list[Tensor | None], *, group_size: int) -> None:
    dtype = arguments[0].dtype
    actual = evaluate(arguments, group_size=group_size, backend="fused", dtype=dtype)
    expected = evaluate(arguments, group_size=group_size, backend="reference", dtype=torch.float64)
    output_tolerance, grad_tolerance = TOLERANCE[dtype]
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.dtype == dtype
        assert (x.double() - y).norm() <= y.norm() * (grad_tolerance if i else output_tolerance), i


def test_definition() -> None:
    x, gate, scale = draw(2, 3, 24, group_size=8, with_scale=True)
    y = gated_norm(x, gate, group_size=8, scale=scale, eps=1e-3)
    for group in range(3):
        columns = slice(8 * group, 8 * group + 8)
        rms = (x[..., columns].square().mean(-1, keepdim=True) + 1e-3).sqrt()
        expected = x[..., columns] / rms * F.silu(gate[..., columns]) * scale[..., group : group + 1]
        torch.testing.assert_close(y[..., columns], expected)


@pytest.mark.parametrize("with_scale", [False, True])
def test_gradcheck(with_scale: bool) -> None:
    x, gate, scale = draw(3, 8, group_size=4, with_scale=with_scale)
    leaves = [t.double().requires_grad_() for t in (x, gate, scale) if t is not None]

    def run(x: Tensor, gate: Tensor, scale: Tensor | None = None) -> Tensor:
        return gated_norm(x, gate, group_size=4, scale=scale)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((64,), 64), ((1, 1, 128), 16), ((3, 7, 96), 32), ((2, 5, 3, 24), 12), ((70, 128), 128)]
)
def test_agrees_with_float64(shape: tuple[int, ...], group_size: int, with_scale: bool) -> None:
    check(draw(*shape, group_size=group_size, with_scale=with_scale), group_size=group_size)


def test_layouts_do_not_matter() -> None:
    x, gate, scale = draw(4, 5, 32, group_size=16, with_scale=True)
    expected = gated_norm(x, gate, group_size=16, scale=scale, backend="fused")
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, gate, scale)]
    turned[0] = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(gated_norm(turned[0], turned[1], group_size=16, scale=turned[2], backend="fused"), expected)


def test_nothing_in_nothing_out() -> None:
    x, gate, _ = draw(2, 0, 32, group_size=16, with_scale=False)
    assert gated_norm(x, gate, group_size=16, backend="fused").shape == (2, 0, 32)


def test_refuses_by_name() -> None:
    x, gate, scale = draw(2, 32, group_size=16, with_scale=True)
    with pytest.raises(ValueError, match="group_size is 12"):
        gated_norm(x, gate, group_size=12, backend="fused")
    with pytest.raises(ValueError, match="scale is"):
        gated_norm(x, gate, group_size=8, scale=scale, backend="fused")
    with pytest.raises(ValueError, match="gate is"):
        gated_norm(x, gate[:1], group_size=16, backend="fused")


@pytest.mark.parametrize("with_scale", [False, True])
def test_operator_is_registered_soundly(with_scale: bool) -> None:
    arguments = draw(3, 32, group_size=16, with_scale=with_scale)
    leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
    torch.library.opcheck(gated_norm_forward, (*leaves, 16, 1e-6))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize(("shape", "group_size"), [((33, 1021, 1536), 128), ((1, 4096, 1536), 64), ((7, 13, 480), 96)])
def test_grid_on_a_gpu(shape: tuple[int, ...], group_size: int, with_scale: bool, dtype: torch.dtype) -> None:
    check(draw(*shape, group_size=group_size, with_scale=with_scale, dtype=dtype), group_size=group_size)
