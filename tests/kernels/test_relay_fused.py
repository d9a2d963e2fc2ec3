"""The relay's launches against its definition in float64."""

import pytest
import torch
from fused_checks import poison_new_memory, relative_error
from test_relay_reference import make_inputs

from kernels.relay import NO_TOKEN, backward, history, relay
from kernels.relay.fused import relay_backward, relay_forward


def run(backend, inputs, grad_x, *, dtype=torch.float32, out_dtype=None, device="cpu"):
    """x, carried ids and gradients of embedding and taps."""
    input_ids, embedding, taps, recent_ids, document_start = (None if z is None else z.to(device) for z in inputs)
    embedding = embedding.to(dtype).detach().requires_grad_()
    taps = taps.to(dtype).detach().requires_grad_()
    x, carried = relay(input_ids, embedding, taps, recent_ids, document_start, out_dtype=out_dtype, backend=backend)
    x.backward(grad_x.to(x))
    return x, carried, embedding.grad, taps.grad


def check(inputs, *, dtype=torch.float32, device="cpu", out_tolerance=1e-5, grad_tolerance=1e-4):
    """Fused against the float64 reference on the same, already rounded, numbers."""
    inputs = [z.to(dtype) if z is not None and z.is_floating_point() else z for z in inputs]
    grad_x = torch.randn(*inputs[0].shape, inputs[1].shape[1], generator=torch.Generator().manual_seed(9)).to(dtype)
    x, carried, grad_embedding, grad_taps = run("fused", inputs, grad_x, dtype=dtype, device=device)
    expected = run("reference", inputs, grad_x, dtype=torch.float64, device=device)
    assert x.dtype == grad_embedding.dtype == grad_taps.dtype == dtype
    assert torch.equal(carried, expected[1])
    assert relative_error(x, expected[0]) < out_tolerance
    assert relative_error(grad_embedding, expected[2]) < grad_tolerance
    assert relative_error(grad_taps, expected[3]) < grad_tolerance


SHAPES = {
    "usual": {},
    "one token": {"num_tokens": 1},
    "one lane": {"lanes": 1, "num_tokens": 5},
    "runs over many programs": {"vocab_size": 2, "lanes": 2, "num_tokens": 50, "starts": 0.02},
    "a single id": {"vocab_size": 1, "lanes": 1, "num_tokens": 130},
    "one tap": {"num_taps": 1},
    "three taps": {"num_taps": 3, "width": 33},
    "every token a start": {"starts": 1.0},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(shape, monkeypatch):
    inputs = make_inputs(**shape)
    poison_new_memory(monkeypatch)
    check(inputs)


def test_no_mask():
    check([*make_inputs()[:4], None])


def test_not_contiguous():
    input_ids, embedding, taps, recent_ids, document_start = make_inputs()
    wide = torch.zeros(7, 10, dtype=torch.float64)
    wide[:, ::2] = embedding
    check([input_ids.t().contiguous().t(), wide[:, ::2], taps.t().contiguous().t(), recent_ids, document_start])
    expanded = torch.ones(()).expand(3, 9, 5)
    inputs = [input_ids, embedding, taps, recent_ids, document_start]
    assert relative_error(run("fused", inputs, expanded)[2], run("reference", inputs, expanded)[2]) < 1e-5


def test_empty():
    input_ids, embedding, taps, recent_ids, document_start = make_inputs(dtype=torch.float32)
    embedding.requires_grad_()
    x, carried = relay(input_ids[:, :0], embedding, taps, recent_ids, document_start[:, :0], backend="fused")
    x.sum().backward()
    assert x.shape == (3, 0, 5)
    assert torch.equal(carried, recent_ids)
    assert not embedding.grad.any()


def test_out_dtype():
    inputs = make_inputs(dtype=torch.float32)
    x, _ = relay(*inputs, out_dtype=torch.float16, backend="fused")
    assert x.dtype == torch.float16
    assert relative_error(x, relay(*inputs)[0]) < 1e-3


def test_id_outside_the_table_shows_as_nan():
    input_ids, embedding, taps, recent_ids, _ = make_inputs(lanes=2, num_tokens=9, dtype=torch.float32)
    input_ids[0, 3], input_ids[1, 5] = 7, -2
    x, _ = relay(input_ids, embedding, taps, recent_ids, backend="fused")
    assert x.isnan().all(-1).nonzero().tolist() == [[0, t] for t in range(3, 7)] + [[1, t] for t in range(5, 9)]


@pytest.mark.parametrize("most_compared", [0, 8192])
def test_history_is_sorted_by_id_then_slot(most_compared, monkeypatch):
    monkeypatch.setattr(history, "_MOST_COMPARED", most_compared)
    input_ids, _, _, recent_ids, _ = make_inputs(lanes=3, num_tokens=110, vocab_size=40)
    ids, slots = history.sort_history(input_ids, recent_ids, multiple=8)
    every = torch.cat([recent_ids, input_ids], 1).reshape(-1)
    expected = torch.cat([every, torch.full((-len(every) % 8,), NO_TOKEN)]).sort(stable=True)
    assert torch.equal(ids.long(), expected.values)
    assert torch.equal(slots, expected.indices)


def test_many_slots_of_a_program(monkeypatch):
    monkeypatch.setattr(backward, "_NUM_PROGRAMS", 2)
    inputs = make_inputs(lanes=2, num_tokens=50, vocab_size=9, starts=0.1)
    assert backward.slots_of_a_program(2 * 53) == 32
    check(inputs)


def test_same_bits_twice():
    inputs = make_inputs(lanes=2, num_tokens=9, vocab_size=3)
    grad_x = torch.randn(2, 9, 5)
    first, second = run("fused", inputs, grad_x), run("fused", inputs, grad_x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators_are_well_formed():
    input_ids, embedding, taps, recent_ids, document_start = make_inputs(lanes=2, num_tokens=2, dtype=torch.float32)
    embedding.requires_grad_()
    torch.library.opcheck(relay_forward, (input_ids, recent_ids, embedding, taps, document_start, 1e-6, torch.float32))
    arguments = (torch.randn(2, 2, 5), input_ids, recent_ids, embedding.detach(), taps, document_start, 1e-6)
    for grad_dtype in (torch.float32, torch.float16):
        torch.library.opcheck(relay_backward, (*arguments, grad_dtype))


def test_compiles_into_one_graph():
    inputs = make_inputs(num_tokens=3, dtype=torch.float32)
    inputs[1].requires_grad_()
    compiled = torch.compile(lambda *z: relay(*z, backend="fused"), backend="aot_eager", fullgraph=True)
    x, carried = compiled(*inputs)
    (grad,) = torch.autograd.grad(x.square().sum(), inputs[1])
    expected, expected_carried = relay(*inputs)
    assert relative_error(x, expected) < 1e-5
    assert torch.equal(carried, expected_carried)
    assert relative_error(grad, torch.autograd.grad(expected.square().sum(), inputs[1])[0]) < 1e-5


def test_refuses_float64():
    with pytest.raises(ValueError, match="float64"):
        relay(*make_inputs(), backend="fused")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lanes", [1, 33])
@pytest.mark.parametrize("num_tokens", [1, 127, 4096])
@pytest.mark.parametrize(("width", "vocab_size"), [(128, 256), (1536, 50257)])
def test_on_gpu(width, vocab_size, num_tokens, lanes, dtype):
    inputs = make_inputs(lanes=lanes, num_tokens=num_tokens, width=width, vocab_size=vocab_size, starts=0.01)
    inputs[3][0] = NO_TOKEN
    tolerances = (1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 2e-2)
    check(inputs, dtype=dtype, device="cuda", out_tolerance=tolerances[0], grad_tolerance=tolerances[1])


@pytest.mark.gpu
def test_zipfian_ids_on_gpu_give_the_same_bits_twice():
    inputs = list(make_inputs(lanes=8, num_tokens=1024, width=512, vocab_size=1000))
    ranks = torch.arange(1, 1001, dtype=torch.float64)
    inputs[0] = torch.multinomial(1 / ranks, 8 * 1024, replacement=True).reshape(8, 1024)
    check(inputs, device="cuda")
    grad_x = torch.randn(8, 1024, 512)
    first, second = (run("fused", inputs, grad_x, device="cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
