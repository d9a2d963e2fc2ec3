"""Traces against forward-mode derivatives of the neuron's definition."""

import pytest
import torch
from torch import Tensor

from kernels.cortex import CortexState
from kernels.cortex.spike import derivative
from neurogen.learning.eligibility import (
    Trace,
    advance,
    by_decay_logit,
    by_drive,
    by_lateral,
    credit,
    own_feedback,
)

THETA, BETA, RHO = 0.5, 0.5, 0.9
LANES, TOKENS, NEURONS, COLUMN = 2, 11, 6, 3


def scan(
    inputs: Tensor, weight: Tensor, lateral: Tensor, logit: Tensor, state: CortexState, kind: str
) -> tuple[Tensor, list[CortexState]]:
    """The neuron as its docstring writes it, with autograd; other neurons' spikes are cut from the recurrence."""
    alpha = logit.sigmoid()
    v, a, s = state
    states, spikes = [], []
    eye = torch.eye(COLUMN, dtype=torch.float64)
    for h in inputs.unbind(1):
        states.append(CortexState(v.detach(), a.detach(), s.detach()))
        columns = s.unflatten(-1, (-1, COLUMN))
        own = torch.einsum("kij,bkj->bki", lateral * eye, columns)
        others = torch.einsum("kij,bkj->bki", lateral * (1 - eye), columns.detach())
        drive = h @ weight.T / (1 - alpha).sqrt() + (own + others).flatten(1)
        a = RHO * a + (1 - RHO) * s
        v = alpha * (v - THETA * s) + (1 - alpha) * drive
        u = v - THETA - BETA * a
        hard = u.clamp(0, 4) if kind == "graded" else (u > 0).double()
        soft = derivative(u.detach(), kind) * (u - u.detach())
        s = hard.detach() + soft
        spikes.append(s)
    states.append(CortexState(v.detach(), a.detach(), s.detach()))
    return torch.stack(spikes, 1), states


@pytest.mark.parametrize("kind", ["graded", "binary"])
def test_traces_give_the_gradient_of_the_neurons_own_dynamics(kind: str) -> None:
    torch.manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    inputs, signal = draw(LANES, TOKENS, 5), draw(LANES, TOKENS, NEURONS)
    weight, lateral = draw(NEURONS, 5).requires_grad_(), (draw(2, COLUMN, COLUMN)).requires_grad_()
    logit = draw(NEURONS).requires_grad_()
    start = CortexState(draw(LANES, NEURONS), draw(LANES, NEURONS).abs(), draw(LANES, NEURONS).abs())
    spikes, states = scan(inputs, weight, lateral, logit, start, kind)
    expected = torch.autograd.grad((spikes * signal).sum(), [weight, lateral, logit])
    assert 0.05 < float((spikes > 0).double().mean()) < 0.95

    with torch.no_grad():
        alpha = logit.sigmoid()
        traces = [Trace.zeros(LANES, NEURONS, num, inputs) for num in (5, COLUMN, 1)]
        got = [torch.zeros(NEURONS, num, dtype=torch.float64) for num in (5, COLUMN, 1)]
        for t, h in enumerate(inputs.unbind(1)):
            before, after = states[t], states[t + 1]
            direct = [
                by_drive(h, alpha),
                by_lateral(before.spikes, alpha, COLUMN),
                by_decay_logit(h @ weight.T, before, lateral, alpha, THETA),
            ]
            psi = derivative(after.voltage - THETA - BETA * after.adaptation, kind)
            for i in range(3):
                traces[i] = advance(
                    traces[i],
                    direct[i],
                    surrogate=psi,
                    decay=alpha,
                    own=own_feedback(lateral, alpha, THETA),
                    adaptation_strength=BETA,
                    adaptation_decay=RHO,
                )
                got[i] += credit(signal[:, t], traces[i])
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs.reshape_as(ours), rtol=1e-11, atol=1e-12)


def test_a_reset_lane_forgets_and_the_others_do_not() -> None:
    trace = Trace(*(torch.rand(3, 2, 4) + 1 for _ in range(3)))
    reset = trace.reset(torch.tensor([1.0, 0.0, 1.0]))
    for before, after in zip(trace, reset):
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        assert not after[1].any()
