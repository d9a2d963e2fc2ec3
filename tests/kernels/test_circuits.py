"""Whole circuits with their projections, fused against the definition in float64: outputs and every gradient."""

import pytest
import torch
from fused_checks import CompileCase, check_compiled, poison_new_memory, relative_error

from kernels.cortex import CortexState
from kernels.cortex_circuit import CortexWeights, cortex_circuit
from kernels.linear import RoundedWeights, full_precision_linear
from kernels.linear.columns import write_columns
from kernels.memory_circuit import MemoryWeights, memory_circuit
from kernels.mlp import mlp

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2)}


class Draw:
    """Normal numbers from one seed, in float64 but already rounded to what the fused form is given."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale=1.0, dtype=torch.float32):
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype).double()


def stores():
    return RoundedWeights(), RoundedWeights()


def compare(run, inputs, *, dtype, device, cast=("h",)):
    """`run(inputs, backend)` gives outputs by name; inputs named in `cast` are of `dtype`, the others float32.

    Between a half-precision projection and the neurons it drives lies a rounding that moves some of them over a kink of
    their derivative, whoever computes it. So in half precision the definition is run in it as well, and the fused form
    may be half as far again from float64 as the definition is, or within the tolerance.
    """
    exact = _evaluate(run, inputs, "reference", torch.float64, torch.float64, device=device, cast=cast)
    fused = _evaluate(run, inputs, "fused", dtype, torch.float32, device=device, cast=cast)
    rounded = [{}, {}]
    if dtype != torch.float32:
        with torch.autocast(device, dtype):
            rounded = _evaluate(run, inputs, "reference", dtype, torch.float32, device=device, cast=cast)
    for tolerance, got, expected, alike in zip(TOLERANCES[dtype], fused, exact, rounded):
        for name, value in expected.items():
            limit = max(tolerance, 1.5 * relative_error(alike[name], value)) if alike else tolerance
            assert relative_error(got[name], value) < limit, name
    for name, grad in fused[1].items():
        assert grad.dtype == (dtype if name in cast else torch.float32), name


def _evaluate(run, inputs, backend, cast_dtype, dtype, *, device, cast):
    """Outputs, and gradients of a fixed random combination of them, by name."""
    leaves = {name: x.to(device, cast_dtype if name in cast else dtype).requires_grad_() for name, x in inputs.items()}
    outputs = run(leaves, backend)
    generator = torch.Generator().manual_seed(3)
    total = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device)).sum()
        for x in outputs.values()
    )
    return outputs, dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))


def few_memory_weights(draw):
    """Two heads of 16 channels, Hebbian, float32."""
    shapes = ((128, 32), (2, 32), (2,), None, None, (32, 32))
    return MemoryWeights(*(None if shape is None else draw(*shape).float() for shape in shapes))


def starts(lanes, tokens, device):
    mask = torch.zeros(lanes, tokens, dtype=torch.bool)
    mask[0, tokens // 2] = mask[-1, 0] = True
    return mask.to(device)


def check_cortex(lanes, tokens, columns, neurons, *, dtype=torch.float32, device="cpu", gated=True, spike="graded"):
    draw, width = Draw(), columns * neurons
    inputs = {
        "h": draw(lanes, tokens, width, dtype=dtype),
        "in_projection": draw(2 * width, width, scale=width**-0.5, dtype=dtype),
        "drive_bias": 0.5 + draw(width, scale=0.1),
        "lateral": draw(columns, neurons, neurons, scale=0.5 * neurons**-0.5),
        "decay": torch.sigmoid(2.0 + draw(width)).float().double(),
        "out_projection": draw(width, width, scale=width**-0.5, dtype=dtype),
        **{name: draw(lanes, width, scale=0.3) for name in CortexState._fields},
    }
    if gated:
        inputs["go"] = torch.sigmoid(draw(lanes, tokens, columns)).float().double()

    def run(x, backend):
        weights = CortexWeights(*(x[name] for name in CortexWeights._fields))
        state = CortexState(*(x[name] for name in CortexState._fields))
        start = starts(lanes, tokens, device)
        out = cortex_circuit(
            x["h"], weights, state, start, x.get("go"), spike_kind=spike, rounded=stores(), backend=backend
        )
        return {"written": out.written, **out.state._asdict()}

    compare(run, inputs, dtype=dtype, device=device)


def check_memory(lanes, tokens, heads, head_width, rule, *, dtype=torch.float32, device="cpu"):
    draw, width = Draw(1), heads * head_width
    inputs = {
        "h": draw(lanes, tokens, width, dtype=dtype),
        "in_projection": draw(4 * width, width, scale=width**-0.5, dtype=dtype),
        "forget": draw(heads, width, scale=width**-0.5),
        "forget_bias": 2.0 + draw(heads),
        "out_projection": draw(width, width, scale=width**-0.5, dtype=dtype),
        "state": draw(lanes, heads, head_width, head_width),
    }
    if rule == "delta":
        inputs |= {"write": draw(heads, width, scale=width**-0.5), "write_bias": draw(heads)}

    def run(x, backend):
        weights = MemoryWeights(*(x.get(name) for name in MemoryWeights._fields))
        start = starts(lanes, tokens, device)
        written, state = memory_circuit(
            x["h"], weights, x["state"], start, rule=rule, rounded=stores(), backend=backend
        )
        return {"written": written, "state": state}

    compare(run, inputs, dtype=dtype, device=device)


def check_mlp(rows, width, hidden, *, dtype=torch.float32, device="cpu"):
    draw = Draw(2)
    inputs = {
        "h": draw(*rows, width, dtype=dtype),
        "in_weight": draw(2 * hidden, width, scale=width**-0.5, dtype=dtype),
        "out_weight": draw(width, hidden, scale=hidden**-0.5, dtype=dtype),
    }

    def run(x, backend):
        return {"out": mlp(x["h"], x["in_weight"], x["out_weight"], rounded=stores(), backend=backend)}

    compare(run, inputs, dtype=dtype, device=device)


def check_full_precision(rows, width, num_out, *, dtype=torch.float32, device="cpu"):
    draw = Draw(4)
    inputs = {
        "h": draw(*rows, width, dtype=dtype),
        "weight": draw(num_out, width, scale=width**-0.5),
        "bias": draw(num_out),
    }

    def run(x, backend):
        return {"out": full_precision_linear(x["h"], x["weight"], x["bias"], backend=backend)}

    compare(run, inputs, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("lanes", "tokens", "gated", "spike"), [(1, 1, True, "binary"), (9, 5, False, "graded"), (2, 3, True, "smooth")]
)
def test_cortex_circuit(lanes, tokens, gated, spike, monkeypatch):
    poison_new_memory(monkeypatch)
    check_cortex(lanes, tokens, 2, 16, gated=gated, spike=spike)


@pytest.mark.parametrize(("lanes", "tokens", "rule"), [(2, 19, "hebbian"), (3, 1, "delta"), (2, 17, "delta")])
def test_memory_circuit(lanes, tokens, rule, monkeypatch):
    poison_new_memory(monkeypatch)
    check_memory(lanes, tokens, 3, 16, rule)


@pytest.mark.parametrize("rows", [(1,), (2, 3)])
def test_mlp(rows, monkeypatch):
    poison_new_memory(monkeypatch)
    check_mlp(rows, 24, 40)


@pytest.mark.parametrize(("rows", "width", "num_out"), [((1,), 16, 1), ((3, 7), 200, 12), ((20,), 24, 17)])
def test_full_precision_linear(rows, width, num_out, monkeypatch):
    poison_new_memory(monkeypatch)
    check_full_precision(rows, width, num_out)


def test_full_precision_sums_are_shared_among_programs_alike(monkeypatch):
    poison_new_memory(monkeypatch)
    draw = Draw(9)
    h, weight, bias = draw(3, 400).float(), draw(5, 400).float(), draw(5).float()
    shared = full_precision_linear(h, weight, bias, backend="fused")
    monkeypatch.setattr("kernels.linear.full_precision._NUM_PROGRAMS", 1)
    alone = full_precision_linear(h, weight, bias, backend="fused")
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    one_number = full_precision_linear(h[:1], weight[:1], bias[:1], backend="fused")
    torch.testing.assert_close(one_number, alone[:1, :1], rtol=1e-5, atol=1e-5)


def test_kernels_for_few_columns_compile_without_spills():
    module = "kernels.linear.full_precision"
    types = {"h_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "out_ptr": "*fp32", "num_rows": "i32"}
    sizes = {"D": 1536, "H": 12, "BLOCK_H": 16, "BLOCK_K": 128}
    shared = sizes | {"SLICE": 128, "SLICES": 12, "BLOCK_N": 16}
    alone = sizes | {"SLICE": 1536, "SLICES": 1, "BLOCK_N": 64}
    columns = {"left_ptr": "*fp32", "right_ptr": "*fp32", "out_ptr": "*bf16", "num_rows": "i32", "stride": "i32"}
    tail = {"H": 12, "WIDTH": 64, "HAS_RIGHT": True, "BLOCK_N": 32, "BLOCK_W": 64}
    finish = {"slice_ptr": "*fp32", "bias_ptr": "*fp32", "out_ptr": "*fp32", "size": "i32"}
    check_compiled(
        [
            CompileCase(module, "full_precision_kernel", types, shared, 4),
            CompileCase(module, "full_precision_kernel", types, alone, 4),
            CompileCase(module, "finish_rows_kernel", finish, {"H": 12, "SLICES": 12, "BLOCK": 256}, 4),
            CompileCase("kernels.linear.columns", "write_columns_kernel", columns, tail, 4),
        ]
    )


@pytest.mark.parametrize("num_rows", [1, 33])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_columns_are_written_into_wider_rows(num_rows, num_parts):
    parts = torch.randn(num_parts, num_rows, 5)
    wide = torch.full((num_rows, 31), float("nan"), dtype=torch.float16)
    write_columns(wide[:, 8:24], *parts)
    assert torch.equal(wide[:, 8 : 8 + 5 * num_parts], torch.cat(list(parts), 1).half())
    assert not wide[:, 8 + 5 * num_parts : 24].any()
    assert wide[:, :8].isnan().all()
    assert wide[:, 24:].isnan().all()


def test_final_state_alone_has_gradients():
    draw = Draw(5)
    h = draw(2, 6, 32).float().requires_grad_()
    weights = MemoryWeights(
        draw(128, 32).float(), draw(2, 32).float(), draw(2).float(), None, None, draw(32, 32).float()
    )
    state = draw(2, 2, 16, 16).float()
    grads = []
    for backend in ("fused", "reference"):
        _, final = memory_circuit(h, weights, state, rounded=stores(), backend=backend)
        grads.append(torch.autograd.grad(final.square().sum(), h)[0])
    assert relative_error(grads[0], grads[1].double()) < 1e-4


@pytest.mark.parametrize("shape", [(0, 3, 32), (2, 0, 32)], ids=str)
def test_no_lanes_or_no_tokens(shape):
    draw = Draw(6)
    weights = MemoryWeights(
        draw(128, 32).float(), draw(2, 32).float(), draw(2).float(), None, None, draw(32, 32).float()
    )
    state = draw(shape[0], 2, 16, 16).float()
    written, final = memory_circuit(torch.zeros(shape), weights, state, rounded=stores(), backend="fused")
    assert written.shape == shape
    assert torch.equal(final, state)


def test_rounded_weights_follow_what_they_are_made_of():
    weights = [torch.randn(3, 4), torch.randn(2, 4)]
    store = RoundedWeights()
    first = store.get(weights, torch.bfloat16, rows_multiple=8)
    assert torch.equal(first[:5], torch.cat(weights).bfloat16())
    assert not first[5:].any()
    weights[1].add_(1.0)
    second = store.get(weights, torch.bfloat16, rows_multiple=8)
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second[3:5], weights[1].bfloat16())


def test_rounded_weights_are_not_made_again_without_need():
    weight, store = torch.randn(3, 4), RoundedWeights()
    copy = store.get([weight], torch.bfloat16)
    copy.zero_()  # as nobody may, to see whether it is written again
    assert not store.get([weight], torch.bfloat16).any()
    torch.autograd.graph.increment_version([weight])
    assert store.get([weight], torch.bfloat16).any()


def test_weights_of_the_type_asked_for_are_themselves():
    weight = torch.randn(3, 4)
    assert RoundedWeights().get([weight], torch.float32).data_ptr() == weight.data_ptr()


def test_a_backward_pass_after_its_weights_were_rounded_anew_is_refused():
    draw = Draw(7)
    h, in_weight, out_weight = draw(2, 8).half().requires_grad_(), draw(8, 8).float(), draw(8, 4).float()
    rounded = stores()
    out = mlp(h, in_weight, out_weight, rounded=rounded, backend="fused")
    out_weight += 1.0
    mlp(h, in_weight, out_weight, rounded=rounded, backend="fused")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


GPU_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.mark.gpu
@GPU_DTYPES
@pytest.mark.parametrize(("lanes", "tokens", "columns", "neurons"), [(1, 1, 2, 64), (33, 65, 3, 64), (5, 501, 2, 128)])
def test_cortex_circuit_on_a_gpu(lanes, tokens, columns, neurons, dtype):
    check_cortex(lanes, tokens, columns, neurons, dtype=dtype, device="cuda")
    check_cortex(lanes, tokens, columns, neurons, dtype=dtype, device="cuda", gated=False)


@pytest.mark.gpu
@GPU_DTYPES
@pytest.mark.parametrize("rule", ["hebbian", "delta"])
@pytest.mark.parametrize(("lanes", "tokens", "heads", "head_width"), [(1, 1, 2, 64), (33, 65, 5, 64), (5, 501, 3, 128)])
def test_memory_circuit_on_a_gpu(lanes, tokens, heads, head_width, rule, dtype):
    check_memory(lanes, tokens, heads, head_width, rule, dtype=dtype, device="cuda")


@pytest.mark.gpu
@GPU_DTYPES
def test_mlp_on_a_gpu(dtype):
    check_mlp((33, 65), 512, 1344, dtype=dtype, device="cuda")


@pytest.mark.gpu
@GPU_DTYPES
@pytest.mark.parametrize("num_rows", [1, 501, 9001])
def test_full_precision_linear_on_a_gpu(num_rows, dtype):
    check_full_precision((num_rows,), 1536, 12, dtype=dtype, device="cuda")


@pytest.mark.gpu
def test_half_precision_activations_cost_the_logits_nothing():
    draw = Draw(8)
    h, weight, bias = draw(501, 1536, dtype=torch.bfloat16), draw(12, 1536, scale=0.03), draw(12)
    out = full_precision_linear(
        h.to("cuda", torch.bfloat16), weight.float().cuda(), bias.float().cuda(), backend="fused"
    )
    assert relative_error(out.cpu(), h @ weight.t() + bias) < 1e-6
