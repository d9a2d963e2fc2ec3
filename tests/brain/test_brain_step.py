"""The cognitive step of one token is the sequence's own mathematics."""

from collections.abc import Callable

import torch

from neurogen import NeuroGen


def test_steps_are_the_sequence(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(memory_rule="delta")
    ids = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    state, outputs = model.init_state(3), []
    with torch.no_grad():
        whole = model.brain(ids, model.embedding, model.init_state(3))
        for t in range(6):
            out, state = model.brain.step(ids[:, t], model.embedding, state)
            outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), whole.broca_output, rtol=0, atol=1e-10)
    for name, tensor in whole.state.tensors().items():
        torch.testing.assert_close(state.tensors()[name], tensor, rtol=0, atol=1e-10)
