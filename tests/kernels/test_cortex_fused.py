"""The cortex's Triton launches against the plain definition in float64.

A spike makes the comparison delicate. Where u is within rounding of 0, two sound implementations may disagree on a
binary spike, an error of 1 that everything after inherits, or, for a graded spike, on which side of its kink the
derivative is taken. Small cases have no such u, and are compared with the reference as it is. Long binary sequences
are compared with `forced_reference`, which is given the spikes and computes u from them in float64, so that each step
is checked by itself: the spikes must be those of u wherever u is not within rounding of 0.
"""

import pytest
import torch
from cortex_cases import Arguments, assert_close, gradients, leaves, loss_of, random_arguments, relative_error, run

from kernels.cortex import CortexOutput, CortexState, cortex, fused
from kernels.cortex.spike import binary_derivative

SINGLE = (1e-5, 1e-4)  # tolerances of outputs and of gradients, float32
HALF = (1e-2, 2e-2)  # bfloat16
TOLERANCES = {torch.float32: SINGLE, torch.float16: HALF, torch.bfloat16: HALF}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill what torch.empty and torch.empty_like return, so that an element never written is seen."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def allocate_and_fill(*args, allocate=allocate, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 99)

        monkeypatch.setattr(torch, name, allocate_and_fill)


def check(arguments, cotangents, **options):
    expected = run(leaves(arguments, torch.float64), cotangents, **options)
    actual = run(leaves(arguments), cotangents, backend="fused", **options)
    assert_close(actual, expected, *TOLERANCES[arguments.drive.dtype])
    return actual, expected


@pytest.mark.parametrize(
    ("shape", "start_rate", "kind"),
    [
        ((1, 1, 1, 16), 0.0, "graded"),
        ((9, 5, 2, 16), 0.3, "graded"),  # nine lanes: a second tile with one
        ((3, 11, 1, 32), 0.0, "binary"),
        ((2, 7, 2, 32), 0.3, "binary"),
        ((2, 4, 1, 64), 0.3, "graded"),
        ((1, 3, 1, 128), 0.3, "graded"),
        ((1, 2, 1, 128), 0.0, "binary"),
        ((1, 1, 1, 128), 0.0, "graded"),
        ((1, 6, 2, 64), 0.3, "binary"),
        ((3, 2, 1, 64), 0.3, "graded"),  # wide columns with more programs than multiprocessors: eight lanes a program
        ((3, 2, 1, 128), 0.3, "binary"),
        ((9, 5, 1, 16), 0.3, "smooth"),
        ((1, 4, 2, 64), 0.3, "smooth"),
    ],
)
def test_against_the_reference(shape, start_rate, kind):
    arguments, cotangents = random_arguments(*shape, start_rate=start_rate, seed=5)
    (out, _), (out_expected, _) = check(arguments, cotangents, spike_kind=kind)
    assert torch.equal(out.num_fired, out_expected.num_fired)
    assert torch.equal(out.num_saturated, out_expected.num_saturated)
    assert out.num_fired.dtype == torch.int32


@pytest.mark.parametrize(
    ("lanes", "width", "kind"), [(3, 16, "graded"), (2, 64, "graded"), (3, 16, "smooth"), (2, 64, "smooth")]
)
def test_other_constants_saturation_and_a_reset_at_the_first_token(lanes, width, kind):
    arguments, cotangents = random_arguments(lanes, 6, 1, width, seed=6)
    start = torch.zeros(lanes, 6, dtype=torch.bool)
    start[0, 0] = start[1, 3] = start[-1, 5] = True
    arguments = arguments._replace(drive=4.0 * arguments.drive, document_start=start)
    options = {"threshold": 0.3, "adaptation_strength": 0.7, "adaptation_decay": 0.0}
    (out, _), (expected, _) = check(arguments, cotangents, spike_kind=kind, **options)
    assert torch.equal(out.num_fired, expected.num_fired)
    assert torch.equal(out.num_saturated, expected.num_saturated)
    assert out.num_saturated.sum() > 0


def test_a_smooth_unit_of_any_size(monkeypatch):
    """Voltages from far below where 1 - exp(-2 u) has no digits left to where tanh is 1, each held to its own size."""
    size = torch.logspace(-12, 2, 64)
    drive = torch.cat([size, -size]).expand(1, 1, 128) / 0.5**0.5  # the decay is 1/2
    state = CortexState(*(torch.zeros(1, 128) for _ in range(3)))
    arguments = Arguments(drive, torch.zeros(8, 16, 16), torch.full((128,), 0.5), state, None)
    options = {"spike_kind": "smooth", "threshold": 0.0, "adaptation_strength": 0.0}
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "fused")):
        x = leaves(arguments, dtype)
        out = cortex(*x, backend=backend, **options)
        (grad,) = torch.autograd.grad(out.spikes.sum(), x.drive)
        results.append((out.spikes.double(), grad.double()))
    (expected, slope), (actual, grad) = results
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, slope, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "kind"), [((3, 12, 2, 16), "graded"), ((1, 12, 1, 64), "graded"), ((3, 9, 1, 16), "smooth")]
)
def test_half_precision_storage(shape, kind):
    arguments, cotangents = random_arguments(*shape, dtype=torch.float16, seed=7)
    (out, grads), _ = check(arguments, cotangents, spike_kind=kind)
    assert out.spikes.dtype == grads["drive"].dtype == torch.float16
    assert out.state.voltage.dtype == grads["decay"].dtype == torch.float32


def test_half_precision_weights_get_half_precision_gradients():
    arguments, cotangents = random_arguments(2, 3, 1, 16, dtype=torch.float16, seed=8)
    arguments = arguments._replace(lateral_weight=arguments.lateral_weight.half())
    _, grads = check(arguments, cotangents)[0]
    assert grads["lateral_weight"].dtype == torch.float16


@pytest.mark.parametrize("width", [16, 64])
def test_a_split_changes_nothing(width):
    arguments, cotangents = random_arguments(2, 7, 1, width, start_rate=0.2, seed=9)
    whole = run(leaves(arguments), cotangents, backend="fused")
    pieces = leaves(arguments)
    state, spikes = pieces.state, []
    for piece in (slice(0, 1), slice(1, 1), slice(1, 5), slice(5, 7)):
        start = arguments.document_start[:, piece]
        part = cortex(pieces.drive[:, piece], *pieces[1:3], state, start, backend="fused")
        state = part.state
        spikes.append(part.spikes)
    joined = whole[0]._replace(spikes=torch.cat(spikes, 1), state=state)
    loss_of(joined, cotangents).backward()
    assert_close((joined, gradients(pieces)), whole, 1e-6, 1e-6)


@pytest.mark.parametrize(("lanes", "tokens"), [(2, 0), (0, 3)])
def test_no_tokens_or_no_lanes(lanes, tokens):
    arguments, cotangents = random_arguments(lanes, tokens, 2, 16)
    out, grads = run(leaves(arguments), cotangents, backend="fused")
    assert out.spikes.shape == (lanes, tokens, 32)
    assert not out.num_fired.any()
    for x, y in zip(out.state, arguments.state):
        assert torch.equal(x, y)
    for name, expected in zip(CortexState._fields, cotangents.state):
        assert torch.equal(grads[name], expected)
    assert not grads["lateral_weight"].any()
    assert not grads["decay"].any()


@pytest.mark.parametrize("width", [16, 64])
def test_strides_of_the_drive_and_of_its_gradient_do_not_matter(width):
    arguments, _ = random_arguments(2, 5, 1, width, seed=10)
    expected = cortex(*arguments[:4], backend="fused").spikes
    for drive in (arguments.drive.contiguous(), arguments.drive.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(cortex(drive, *arguments[1:4], backend="fused").spikes, expected)
    summed, explicit = leaves(arguments), leaves(arguments)
    cortex(*summed[:4], backend="fused").spikes.sum().backward()  # its gradient has strides of zero
    out = cortex(*explicit[:4], backend="fused").spikes
    out.backward(torch.ones_like(out))
    assert torch.equal(summed.drive.grad, explicit.drive.grad)


def test_nothing_is_kept_for_backward_without_gradients(monkeypatch):
    arguments, _ = random_arguments(1, 3, 1, 16)
    sizes = []
    forward = fused.cortex_forward
    monkeypatch.setattr(fused, "cortex_forward", lambda *args: sizes.append((out := forward(*args))[-1].numel()) or out)
    cortex(*arguments[:4], backend="fused")
    with torch.no_grad():
        cortex(*leaves(arguments)[:4], backend="fused")
    cortex(*leaves(arguments)[:4], backend="fused")
    assert sizes == [0, 0, 48]


@pytest.mark.parametrize("width", [16, 64])
def test_what_is_kept_for_backward_does_not_change_the_rest(width):
    arguments, _ = random_arguments(2, 4, 1, width, start_rate=0.3, seed=15)
    kept = cortex(*leaves(arguments), backend="fused")
    with torch.no_grad():
        alone = cortex(*arguments, backend="fused")
    for x, y in zip((kept.spikes, *kept.state, *kept[2:]), (alone.spikes, *alone.state, *alone[2:]), strict=True):
        assert torch.equal(x, y)


def test_custom_operators():
    arguments, _ = random_arguments(2, 3, 1, 16, start_rate=0.3)
    check_operators(arguments)


def check_operators(arguments: Arguments):
    drive, lateral_weight, decay, state, start = leaves(arguments)
    constants = ("graded", 0.5, 0.5, 0.95)
    inputs = (drive.detach().contiguous().requires_grad_(), lateral_weight, decay, *state, start, *constants, True)
    torch.library.opcheck(fused.cortex_forward, inputs)
    spikes, *final, _, excess = (x.detach() for x in fused.cortex_forward(*inputs))
    tensors = [x.detach() for x in inputs[:6]]
    inputs = (torch.ones_like(spikes), *final, *tensors, start, spikes, excess, *constants)
    torch.library.opcheck(fused.cortex_backward, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drive": torch.zeros(2, 3, 24)}, "drive is"),
        ({"drive": torch.zeros(2, 3, 16, dtype=torch.int32)}, "the drive is torch.int32"),
        ({"lateral_weight": torch.zeros(2, 8, 8)}, "8 neurons"),
        ({"decay": torch.zeros(16, dtype=torch.float16)}, "decay is torch.float16"),
        ({"decay": torch.zeros(16, dtype=torch.float64)}, "float64"),
        ({"document_start": torch.zeros(2, 4, dtype=torch.bool)}, "document_start is"),
        ({"document_start": torch.zeros(2, 3, dtype=torch.int64)}, "torch.bool"),
    ],
)
def test_what_the_kernels_would_misread_is_refused(change, message):
    arguments, _ = random_arguments(2, 3, 1, 16)
    with pytest.raises(ValueError, match=message):
        cortex(*arguments._replace(**change), backend="fused")
    with pytest.raises(ValueError, match="one of graded, binary, smooth"):
        cortex(*arguments, spike_kind="loud", backend="fused")


class _ForcedSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, spikes):
        ctx.save_for_backward(u)
        return spikes.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * binary_derivative(ctx.saved_tensors[0]), None


def forced_reference(arguments: Arguments, spikes: torch.Tensor):
    """Binary neurons made to fire as `spikes` `[B, T, D]` say: u of every token, and the output."""
    drive, weight, alpha, (v, a, s), start = arguments
    num_columns, width, _ = weight.shape
    spikes, all_u, forced = spikes.to(drive.dtype), [], []
    for t in range(drive.shape[1]):
        if start is not None:
            v, a, s = (torch.where(start[:, t, None], torch.zeros_like(x), x) for x in (v, a, s))
        lateral = torch.einsum("kij,bkj->bki", weight, s.unflatten(1, (num_columns, width))).flatten(1)
        p = drive[:, t] / (1 - alpha).sqrt() + lateral
        a, v = 0.95 * a + 0.05 * s, alpha * (v - 0.5 * s) + (1 - alpha) * p
        u = v - 0.5 - 0.5 * a
        s = _ForcedSpike.apply(u, spikes[:, t])
        all_u.append(u)
        forced.append(s)
    counts = (spikes > 0).sum((0, 1), dtype=torch.int32)
    return torch.stack(all_u, 1), CortexOutput(torch.stack(forced, 1), CortexState(v, a, s), counts, counts)


def check_forced(arguments, cotangents):
    actual = run(leaves(arguments), cotangents, spike_kind="binary", backend="fused")
    spikes = actual[0].spikes.detach()
    double = leaves(arguments, torch.float64)
    u, out = forced_reference(double, spikes)
    loss_of(out, cotangents).backward()
    output_tolerance, gradient_tolerance = TOLERANCES[arguments.drive.dtype]
    certain = u.abs() > 10 * output_tolerance * u.std()
    assert certain.double().mean() > 0.8
    assert torch.equal(spikes[certain] > 0, u[certain] > 0)
    assert_close(actual, (out, gradients(double)), output_tolerance, gradient_tolerance)
    for count in (actual[0].num_fired, actual[0].num_saturated):
        assert torch.equal(count, out.num_fired)


def test_binary_spikes_step_by_step():
    check_forced(*random_arguments(2, 24, 1, 16, start_rate=0.1, seed=11))


GRID = [
    # lanes, tokens, columns, neurons a column, start rate
    (1, 1, 1, 64, 0.0),
    (33, 1, 2, 128, 0.5),
    (64, 1, 1, 16, 0.0),
    (1, 500, 2, 128, 0.0),
    (1, 1, 12, 128, 0.0),
    (1, 500, 12, 128, 0.01),
    (1, 500, 8, 64, 0.01),
    (2, 3, 2, 64, 0.5),
    (11, 65, 12, 128, 0.05),  # as many programs as an H200 has multiprocessors, and more: one lane and eight a program
    (12, 65, 12, 128, 0.05),
    (5, 37, 3, 16, 0.1),
    (9, 129, 3, 32, 0.1),
    (33, 65, 3, 64, 0.05),
    (33, 255, 2, 128, 0.02),
    (64, 512, 2, 64, 0.0),
    (2, 4096, 1, 64, 0.001),
    (3, 4096, 1, 128, 0.0),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", GRID)
def test_grid(shape, dtype):
    *sizes, start_rate = shape
    arguments, cotangents = random_arguments(*sizes, start_rate=start_rate, dtype=dtype, device="cuda", seed=12)
    check(arguments, cotangents)
    check(arguments, cotangents, spike_kind="smooth")
    check_forced(arguments, cotangents)


@pytest.mark.gpu
def test_more_elements_than_int32_counts():
    """Only the last lanes are compared: their offsets are past 2^31, and they are too many for one lane a program."""
    lanes, tokens, width = 48, 32768, 1536
    drive = torch.randn(lanes, tokens, width, device="cuda", dtype=torch.bfloat16)
    assert drive.numel() > 2**31
    arguments, _ = random_arguments(lanes, 1, 12, 128, dtype=torch.bfloat16, device="cuda")
    last = slice(lanes - 16, lanes)
    with torch.no_grad():
        out = cortex(drive, *arguments[1:4], backend="fused")
        state = CortexState(*(x[last] for x in arguments.state))
        part = cortex(drive[last], *arguments[1:3], state, backend="fused")
    assert torch.equal(out.spikes[last], part.spikes)
    assert torch.equal(out.state.voltage[last], part.state.voltage)


@pytest.mark.gpu
def test_the_same_bits_at_every_run():
    arguments, cotangents = random_arguments(33, 300, 2, 128, dtype=torch.bfloat16, device="cuda", start_rate=0.01)
    first, second = (run(leaves(arguments), cotangents, backend="fused") for _ in range(2))
    assert_close(first, second, 0.0, 0.0)


@pytest.mark.gpu
def test_custom_operators_on_a_gpu():
    arguments, _ = random_arguments(9, 5, 2, 64, dtype=torch.bfloat16, device="cuda", start_rate=0.3)
    check_operators(arguments)


@pytest.mark.gpu
def test_torch_compile():
    arguments, cotangents = random_arguments(5, 17, 2, 64, dtype=torch.bfloat16, device="cuda", start_rate=0.1)
    compiled = torch.compile(cortex, fullgraph=True)
    eager, traced = leaves(arguments), leaves(arguments)
    expected = run(eager, cotangents, backend="fused")
    out = compiled(*traced, backend="fused")
    loss_of(out, cotangents).backward()
    assert_close((out, gradients(traced)), expected, 0.0, 1e-6)


@pytest.mark.gpu
def test_cuda_graph():
    first, cotangents = random_arguments(9, 40, 2, 64, dtype=torch.bfloat16, device="cuda", seed=13)
    second, _ = random_arguments(9, 40, 2, 64, dtype=torch.bfloat16, device="cuda", seed=14)
    static = leaves(first)
    # A leaf, not a view of one: the view was made on another stream, and its backward pass runs where it was made.
    static = static._replace(drive=static.drive.detach().requires_grad_())
    tensors = (static.drive, static.lateral_weight, static.decay, *static.state)

    def step():
        out = cortex(*static[:4], backend="fused")
        return out, torch.autograd.grad(loss_of(out, cotangents), tensors)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = step()
    with torch.no_grad():
        static.drive.copy_(second.drive)
    graph.replay()
    torch.cuda.synchronize()
    expected, expected_grads = run(leaves(first._replace(drive=second.drive)), cotangents, backend="fused")
    assert torch.equal(out.spikes, expected.spikes)
    for grad, expected_grad in zip(grads, expected_grads.values()):
        assert relative_error(grad, expected_grad) <= 1e-6
