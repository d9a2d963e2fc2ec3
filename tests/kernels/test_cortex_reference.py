"""The plain torch cortex against its formulas, written out token by token and neuron by neuron in Python floats."""

import math

import pytest
import torch
from cortex_cases import Arguments, gradients, leaves, loss_of, random_arguments, relative_error, run

from kernels.cortex import CEILINGS, GRADED_CEILING, SPIKES, CortexState, cortex

THRESHOLD, STRENGTH, RHO = 0.4, 0.6, 0.9
OPTIONS = {"threshold": THRESHOLD, "adaptation_strength": STRENGTH, "adaptation_decay": RHO}


def float_spike(u: float, kind: str) -> float:
    if kind == "smooth":
        return math.tanh(u)
    return (1.0 if u > 0 else 0.0) if kind == "binary" else min(max(u, 0.0), 4.0)


def float_derivative(u: float, kind: str) -> float:
    if kind == "smooth":
        return 1.0 / math.cosh(u) ** 2
    if kind == "binary":
        return 1.0 / (1.0 + (math.pi * u) ** 2)
    return 1.0 if 0 < u < 4 else 0.2 / (1.0 + 9.0 * u * u)


def by_hand(arguments, cotangents, kind):
    """Forward by the formulas, and backward by back-propagation through time derived from them by hand.

    Backward, with a bar for the gradient of the loss: s'bar, a'bar, v'bar are what token t gives to token t - 1.
    """
    drive, weight, alpha, state, start = (x.tolist() if torch.is_tensor(x) else x for x in arguments)
    B, T, D, K, C = *arguments.drive.shape, *arguments.lateral_weight.shape[:2]
    spikes = [[[0.0] * D for _ in range(T)] for _ in range(B)]
    final = [[[0.0] * D for _ in range(B)] for _ in range(3)]
    d_drive = torch.zeros(B, T, D, dtype=torch.float64)
    d_weight = torch.zeros(K, C, C, dtype=torch.float64)
    d_alpha = torch.zeros(D, dtype=torch.float64)
    d_state = torch.zeros(3, B, D, dtype=torch.float64)
    for b in range(B):
        v, a, s = (x[b].tolist() for x in state)
        tape = []
        for t in range(T):
            if start is not None and start[b][t]:
                v, a, s = [0.0] * D, [0.0] * D, [0.0] * D
            before = v, a, s
            lateral = [
                sum(weight[i // C][i % C][j] * s[i // C * C + j] for j in range(C)) for i in range(D)
            ]  # from the neurons of its own column
            v = [0.0] * D
            a = [0.0] * D
            u = [0.0] * D
            for i in range(D):
                p = drive[b][t][i] / math.sqrt(1 - alpha[i]) + lateral[i]
                a[i] = RHO * before[1][i] + (1 - RHO) * before[2][i]
                v[i] = alpha[i] * (before[0][i] - THRESHOLD * before[2][i]) + (1 - alpha[i]) * p
                u[i] = v[i] - THRESHOLD - STRENGTH * a[i]
            s = [float_spike(x, kind) for x in u]
            spikes[b][t] = s
            tape.append((*before, lateral, u))
        for k, x in enumerate((v, a, s)):
            final[k][b] = x

        v_bar, a_bar, s_bar = (x[b].tolist() for x in cotangents.state)
        for t in reversed(range(T)):
            v, a, s, lateral, u = tape[t]
            s_bar = [x + y for x, y in zip(s_bar, cotangents.spikes[b, t].tolist())]
            u_bar = [x * float_derivative(y, kind) for x, y in zip(s_bar, u)]
            v_bar = [x + y for x, y in zip(v_bar, u_bar)]
            a_bar = [x - STRENGTH * y for x, y in zip(a_bar, u_bar)]
            p_bar = [(1 - alpha[i]) * v_bar[i] for i in range(D)]
            s_bar = [(1 - RHO) * a_bar[i] - alpha[i] * THRESHOLD * v_bar[i] for i in range(D)]
            for i in range(D):
                d_drive[b, t, i] = p_bar[i] / math.sqrt(1 - alpha[i])
                dp = 0.5 * drive[b][t][i] * (1 - alpha[i]) ** -1.5
                p = drive[b][t][i] / math.sqrt(1 - alpha[i]) + lateral[i]
                d_alpha[i] += v_bar[i] * (v[i] - THRESHOLD * s[i] - p) + p_bar[i] * dp
                for j in range(C):
                    d_weight[i // C, i % C, j] += p_bar[i] * s[i // C * C + j]
                    s_bar[i // C * C + j] += weight[i // C][i % C][j] * p_bar[i]
            v_bar = [alpha[i] * v_bar[i] for i in range(D)]
            a_bar = [RHO * x for x in a_bar]
            if start is not None and start[b][t]:
                v_bar, a_bar, s_bar = [0.0] * D, [0.0] * D, [0.0] * D
        for k, x in enumerate((v_bar, a_bar, s_bar)):
            d_state[k, b] = torch.tensor(x, dtype=torch.float64)
    grads = dict(zip(("drive", "lateral_weight", "decay", "voltage", "adaptation", "spikes"),
                     (d_drive, d_weight, d_alpha, *d_state)))  # fmt: skip
    return torch.tensor(spikes, dtype=torch.float64).view(B, T, D), torch.tensor(final, dtype=torch.float64), grads


@pytest.mark.parametrize("kind", SPIKES)
@pytest.mark.parametrize("start_rate", [0.0, 0.4])
def test_forward_and_backward_by_hand(kind, start_rate):
    arguments, cotangents = random_arguments(2, 9, 2, 3, start_rate=start_rate, seed=1)
    if start_rate > 0:
        arguments.document_start[0, 0] = True
    double = leaves(arguments, torch.float64)
    out, grads = run(double, cotangents, spike_kind=kind, **OPTIONS)
    spikes, final, expected = by_hand(
        Arguments(*(x.detach() if torch.is_tensor(x) else x for x in double)), cotangents, kind
    )
    torch.testing.assert_close(out.spikes, spikes, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.stack(out.state), final, rtol=1e-10, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-11, msg=name)
    assert out.num_fired.tolist() == (spikes > 0).sum((0, 1)).tolist()
    assert out.num_saturated.tolist() == (spikes.abs() >= CEILINGS[kind]).sum((0, 1)).tolist()
    assert 0 < int(out.num_fired.sum()) < spikes.numel()


def test_gradients_are_the_derivatives_where_the_spike_is_linear():
    arguments, _ = random_arguments(2, 4, 1, 3, seed=2)
    # Strong drive, weak coupling and a middling decay keep every u inside (0, 4), where the surrogate is exact.
    arguments = arguments._replace(
        drive=2.0 + 0.1 * arguments.drive,
        lateral_weight=0.1 * arguments.lateral_weight,
        decay=0.5 + 0.1 * arguments.decay,
        state=CortexState(*(0.1 * x for x in arguments.state)),
    )
    tensors = [x.double().requires_grad_() for x in (*arguments[:3], *arguments.state)]

    def call(drive, weight, decay, *state):
        out = cortex(drive, weight, decay, CortexState(*state), **OPTIONS)
        return out.spikes, *out.state

    spikes = call(*tensors)[0]
    assert spikes.min() > 0
    assert spikes.max() < GRADED_CEILING
    assert torch.autograd.gradcheck(call, tensors)


def test_a_smooth_units_gradients_are_the_derivatives_everywhere():
    arguments, _ = random_arguments(2, 4, 1, 3, start_rate=0.3, seed=2)
    tensors = [x.double().requires_grad_() for x in (*arguments[:3], *arguments.state)]

    def call(drive, weight, decay, *state):
        out = cortex(
            drive, weight, decay, CortexState(*state), arguments.document_start, spike_kind="smooth", **OPTIONS
        )
        return out.spikes, *out.state

    assert call(*tensors)[0].min() < 0
    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("kind", SPIKES)
def test_a_split_changes_nothing(kind):
    arguments, cotangents = random_arguments(3, 11, 2, 4, start_rate=0.2, seed=3)
    whole = leaves(arguments, torch.float64)
    out, grads = run(whole, cotangents, spike_kind=kind)
    pieces = leaves(arguments, torch.float64)
    state, spikes, fired = pieces.state, [], 0
    for piece in (slice(0, 1), slice(1, 6), slice(6, 6), slice(6, 11)):
        part = cortex(pieces.drive[:, piece], *pieces[1:3], state, pieces.document_start[:, piece], spike_kind=kind)
        state = part.state
        spikes.append(part.spikes)
        fired = fired + part.num_fired
    joined = out._replace(spikes=torch.cat(spikes, 1), state=state, num_fired=fired)
    loss_of(joined, cotangents).backward()
    assert relative_error(joined.spikes, out.spikes) < 1e-10
    assert torch.equal(joined.num_fired, out.num_fired)
    for x, y in zip(joined.state, out.state):
        assert relative_error(x, y) < 1e-10
    for name, grad in gradients(pieces).items():
        assert relative_error(grad, grads[name]) < 1e-10, name


def test_a_reset_separates_documents():
    arguments, cotangents = random_arguments(1, 10, 2, 4, seed=4)
    start = torch.zeros(1, 10, dtype=torch.bool)
    start[0, 4] = True
    packed = leaves(arguments._replace(document_start=start), torch.float64)
    out, grads = run(packed, cotangents)
    first = leaves(arguments._replace(drive=arguments.drive[:, :4]), torch.float64)
    fresh = CortexState(*(torch.zeros_like(x) for x in arguments.state))
    second = leaves(arguments._replace(drive=arguments.drive[:, 4:], state=fresh), torch.float64)
    no_state = cotangents.state._make(torch.zeros_like(x) for x in cotangents.state)
    out_first, grads_first = run(first, cotangents._replace(spikes=cotangents.spikes[:, :4], state=no_state))
    out_second, grads_second = run(second, cotangents._replace(spikes=cotangents.spikes[:, 4:]))
    assert relative_error(out.spikes, torch.cat([out_first.spikes, out_second.spikes], 1)) < 1e-10
    for x, y in zip(out.state, out_second.state):
        assert relative_error(x, y) < 1e-10
    assert relative_error(grads["drive"], torch.cat([grads_first["drive"], grads_second["drive"]], 1)) < 1e-10
    for name in ("lateral_weight", "decay"):
        assert relative_error(grads[name], grads_first[name] + grads_second[name]) < 1e-10
    for name in ("voltage", "adaptation", "spikes"):
        assert relative_error(grads[name], grads_first[name]) < 1e-10


def test_no_tokens_keep_the_state():
    arguments, cotangents = random_arguments(2, 0, 1, 4)
    out, grads = run(leaves(arguments), cotangents)
    assert out.spikes.shape == (2, 0, 4)
    assert not out.num_fired.any()
    for x, y in zip(out.state, arguments.state):
        assert torch.equal(x, y)
    for name, expected in zip(CortexState._fields, cotangents.state):
        assert torch.equal(grads[name], expected)


def test_half_precision_storage_keeps_a_float32_state():
    arguments, _ = random_arguments(2, 5, 1, 8, dtype=torch.bfloat16)
    out = cortex(*arguments[:4])
    assert out.spikes.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in out.state)
