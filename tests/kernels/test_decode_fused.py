"""The fused decoder against its definition in float64."""

import pytest
import torch
from fused_checks import poison_new_memory, relative_error
from test_decode_reference import make_inputs

import kernels.decode.fused as fused
from kernels.decode import decode
from kernels.decode.rows import scale_
from kernels.linear import RoundedWeights


def run(backend, inputs, *, upstream=1.0, device="cpu", dtype=None, weight_dtype=None):
    """Output and gradients of hidden and weight."""
    hidden, weight, target_ids = inputs
    hidden = hidden.to(device, dtype or hidden.dtype).detach().requires_grad_()
    weight = weight.to(device, weight_dtype or dtype or weight.dtype).detach().requires_grad_()
    out = decode(hidden, weight, target_ids.to(device), backend=backend)
    (out.loss * upstream).backward()
    return out, hidden.grad, weight.grad


def check(inputs, *, upstream=1.0, device="cpu", dtype=torch.float32, weight_dtype=None):
    """Fused against the float64 reference on the same, already rounded, numbers."""
    hidden, weight, target_ids = inputs
    inputs = (hidden.to(dtype), weight.to(dtype), target_ids)
    out, grad_hidden, grad_weight = run("fused", inputs, upstream=upstream, device=device, weight_dtype=weight_dtype)
    expected, *expected_grads = run("reference", inputs, upstream=upstream, device=device, dtype=torch.float64)
    out_tolerance, grad_tolerance = (1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 2e-2)
    assert out.loss.dtype == torch.float32
    assert relative_error(out.loss, expected.loss) < out_tolerance
    assert relative_error(grad_hidden, expected_grads[0]) < grad_tolerance
    assert relative_error(grad_weight, expected_grads[1]) < grad_tolerance
    assert torch.equal(out.num_targets, expected.num_targets)
    if dtype == torch.float32:
        assert torch.equal(out.num_correct, expected.num_correct)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most eight rows."""
    monkeypatch.setattr(fused, "LOGITS_BYTES", 8 * 64 * 4)
    monkeypatch.setattr(fused, "_CHUNK_MULTIPLE", 4)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 21])
@pytest.mark.usefixtures("small_chunks")
def test_chunks_of_rows(num_tokens, monkeypatch):
    assert fused.chunk_rows(num_tokens, 64 * 4) <= 8
    inputs = make_inputs(num_tokens=num_tokens, vocab_size=61, ignored=0.0 if num_tokens == 1 else 0.3)
    poison_new_memory(monkeypatch)
    check(inputs)


@pytest.mark.parametrize(("num_tokens", "vocab_size", "width"), [(1, 1, 4), (16, 64, 16), (17, 65, 36), (37, 90, 8)])
def test_one_launch(num_tokens, vocab_size, width, monkeypatch):
    """Chunks of 16 rows, and tiles that do not divide anything."""
    monkeypatch.setattr(fused, "ONE_LAUNCH", True)
    monkeypatch.setattr(fused, "LOGITS_BYTES", 16 * 128 * 4)
    monkeypatch.setattr(fused, "_CHUNK_MULTIPLE", 16)
    inputs = make_inputs(num_tokens=num_tokens, vocab_size=vocab_size, width=width, ignored=0.3 * (num_tokens > 1))
    poison_new_memory(monkeypatch)
    check(inputs, upstream=0.5)


@pytest.mark.parametrize(("num_tokens", "vocab_size", "width"), [(1, 127, 4), (7, 330, 36), (37, 200, 20)])
@pytest.mark.parametrize("num_slices", [2, 3, 5])
def test_slices_of_the_hidden_gradient(num_tokens, vocab_size, width, num_slices, monkeypatch):
    """Chunks of 16 rows, the last one shorter; slices that do not divide the vocabulary."""
    monkeypatch.setattr(fused, "ONE_LAUNCH", True)
    monkeypatch.setattr(fused, "LOGITS_BYTES", 16 * 384 * 4)
    monkeypatch.setattr(fused, "_CHUNK_MULTIPLE", 16)
    monkeypatch.setattr("kernels.decode.one_launch.count_slices", lambda *_: num_slices)
    inputs = make_inputs(num_tokens=num_tokens, vocab_size=vocab_size, width=width, ignored=0.3 * (num_tokens > 1))
    poison_new_memory(monkeypatch)
    check(inputs, upstream=0.5)
    first, second = run("fused", inputs, dtype=torch.float32), run("fused", inputs, dtype=torch.float32)
    assert torch.equal(first[1], second[1])


def test_number_of_slices():
    """Slices are short and fit into memory; a chunk with tiles enough has none."""
    from kernels.decode.one_launch import count_slices

    plenty = fused.WORKING_BYTES - fused.LOGITS_BYTES
    for width in (512, 1536, 4096):
        for num_rows in (1, 33, 500, 1024):
            num_slices = count_slices(num_rows, width, 50304, 132, plenty)
            rows = -(-num_rows // 128) * 128
            assert num_slices * rows * width * 4 <= plenty
            num_tiles = num_slices * rows // 128 * -(-width // 256)
            assert 44 <= num_tiles <= 132 + rows // 128 * -(-width // 256)
    assert count_slices(500, 1536, 50304, 132, plenty) == 3
    assert count_slices(500, 1536, 50304, 132, 2 * 512 * 1536 * 4) == 2
    assert count_slices(500, 1536, 50304, 132, 0) == 1
    assert count_slices(2048, 1536, 50304, 132, plenty) == 1


@pytest.mark.parametrize("vocab_size", [1, 2, 64, 65, 4096, 4097, 9001])
def test_vocabulary_sizes(vocab_size, monkeypatch):
    inputs = make_inputs(num_tokens=3, width=5, vocab_size=vocab_size)
    poison_new_memory(monkeypatch)
    check(inputs)


def test_a_kept_copy_of_the_weight_is_used_and_follows_it():
    hidden, weight, target_ids = make_inputs(dtype=torch.float32)
    store, weight = RoundedWeights(), weight.clone()
    for _ in range(2):
        out = decode(hidden.half(), weight, target_ids, rounded=store, backend="fused")
        expected = decode(hidden.half(), weight.half().float(), target_ids)
        assert relative_error(out.loss, expected.loss) < 1e-3
        weight += 1.0


def test_upstream_gradient_scales():
    check(make_inputs(), upstream=-2.5)


def test_large_logits():
    hidden, weight, target_ids = make_inputs()
    check((200 * hidden, weight, target_ids))


def test_right_answers_are_counted():
    out = decode(5 * torch.eye(4), torch.eye(4), torch.tensor([0, 1, 3, 3]), backend="fused")
    assert out.num_correct.item() == 3


def test_tie_goes_to_the_lowest_id():
    weight = torch.zeros(5000, 3)
    weight[[3, 4099, 4500]] = 1.0  # the first two share a position of the blocks
    out = decode(torch.ones(3, 3), weight, torch.tensor([3, 4099, 4500]), backend="fused")
    assert out.num_correct.item() == 1


def test_shape_of_hidden_and_layout_do_not_matter():
    hidden, weight, target_ids = make_inputs(dtype=torch.float32)
    expected = run("fused", (hidden, weight, target_ids))
    shaped = (hidden.t().contiguous().t().unflatten(0, (3, 4)), weight.t().contiguous().t(), target_ids.view(3, 4))
    out, grad_hidden, grad_weight = run("fused", shaped)
    torch.testing.assert_close(out.loss, expected[0].loss)
    torch.testing.assert_close(grad_hidden.flatten(0, 1), expected[1])
    torch.testing.assert_close(grad_weight, expected[2])


@pytest.mark.parametrize("which", ["hidden", "weight", "neither"])
def test_only_needed_gradients(which):
    hidden, weight, target_ids = make_inputs(dtype=torch.float32)
    hidden.requires_grad_(which == "hidden"), weight.requires_grad_(which == "weight")
    out = decode(hidden, weight, target_ids, backend="fused")
    expected = decode(hidden, weight, target_ids)
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.loss.requires_grad == (which != "neither")
    if which != "neither":
        leaf = hidden if which == "hidden" else weight
        (grad,) = torch.autograd.grad(out.loss, leaf)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.loss, leaf)[0])


def test_second_backward_is_refused():
    hidden, weight, target_ids = make_inputs(dtype=torch.float32)
    out = decode(hidden.requires_grad_(), weight, target_ids, backend="fused")
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_target_outside_the_vocabulary_shows_as_nan():
    hidden, weight, target_ids = make_inputs(dtype=torch.float32, ignored=0.0)
    for wrong in (9, -1):
        target_ids[4] = wrong
        out, grad_hidden, _ = run("fused", (hidden, weight, target_ids))
        assert out.loss.isnan()
        assert grad_hidden.isnan().any(-1).nonzero().tolist() == [[4]]


def test_same_bits_twice():
    inputs = make_inputs(dtype=torch.float32)
    first, second = run("fused", inputs), run("fused", inputs)
    assert torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[2], second[2])


def test_chunks_fit_in_working_memory():
    for vocab_size in (256, 32000, 50304, 128256):
        for num_rows in (1, 500, 8192, 32768, 10**6):
            rows = fused.chunk_rows(num_rows, vocab_size * 2)
            assert rows * vocab_size * 2 <= fused.LOGITS_BYTES
            assert rows == 128 or rows < num_rows + 128
    assert fused.chunk_rows(32768, 50304 * 2) == 2048


def test_operators_are_well_formed():
    hidden, weight, target_ids = make_inputs(num_tokens=2, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    # Not the check of compilation, which takes the gradients among the outputs too, as no caller does; see below.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (hidden, weight, weight.detach().clone(), target_ids, -100, True, True, 0)
    for grad_dtype in (torch.float32, torch.float16):
        torch.library.opcheck(fused.decode_forward, (*arguments, grad_dtype), test_utils=utils)
    torch.library.opcheck(scale_, (torch.ones(3), torch.tensor(2.0)))


@pytest.mark.filterwarnings("ignore:`torch.jit.*`:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiles_into_one_graph(compiler, dynamic):
    hidden, weight, target_ids = make_inputs(num_tokens=3, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    compiled = torch.compile(
        lambda *z: decode(*z, backend="fused").loss * 3, backend=compiler, fullgraph=True, dynamic=dynamic
    )
    loss = compiled(hidden, weight, target_ids)
    grads = torch.autograd.grad(loss, (hidden, weight))
    expected = decode(hidden, weight, target_ids).loss * 3
    assert relative_error(loss, expected) < 1e-5
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert relative_error(grad, expected_grad) < 1e-5


def test_refuses_float64():
    with pytest.raises(ValueError, match="float64"):
        decode(*make_inputs(), backend="fused")


@pytest.mark.gpu
@pytest.mark.parametrize("one_launch", [False, True])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32")])
@pytest.mark.parametrize("num_tokens", [1, 33, 500, 4097])
@pytest.mark.parametrize(("width", "vocab_size"), [(128, 256), (1536, 50257)])
def test_on_gpu(width, vocab_size, num_tokens, dtype, weight_dtype, one_launch, monkeypatch):
    monkeypatch.setattr(fused, "ONE_LAUNCH", one_launch)
    inputs = make_inputs(num_tokens=num_tokens, width=width, vocab_size=vocab_size, ignored=0.1 * (num_tokens > 1))
    inputs = (inputs[0], inputs[1] / width**0.5, inputs[2])
    check(inputs, device="cuda", dtype=getattr(torch, dtype), weight_dtype=getattr(torch, weight_dtype), upstream=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1024, 32768])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_working_memory_on_gpu(weight_dtype, num_tokens):
    hidden = torch.randn(num_tokens, 1536, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(50257, 1536, device="cuda") / 40).to(weight_dtype).requires_grad_()
    target_ids = torch.randint(50257, (num_tokens,), device="cuda")
    decode(hidden[:128], weight, target_ids[:128], backend="fused").loss.backward()  # library workspaces
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decode(hidden, weight, target_ids, backend="fused").loss.backward()
    working = torch.cuda.max_memory_allocated() - before - hidden.grad.nbytes - weight.grad.nbytes
    assert working <= 256 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "width"), [(500, 1536), (5000, 512)])
@pytest.mark.parametrize("one_launch", [False, True])
def test_same_bits_twice_on_gpu(one_launch, num_tokens, width, monkeypatch):
    monkeypatch.setattr(fused, "ONE_LAUNCH", one_launch)
    inputs = make_inputs(num_tokens=num_tokens, width=width, vocab_size=50257, dtype=torch.bfloat16)
    first, second = run("fused", inputs, device="cuda"), run("fused", inputs, device="cuda")
    assert torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
