"""The whole model: shapes, pieces of a sequence, documents, training, counts by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neurogen import BrainConfig, BrainState, NeuroGen, UserError

KINDS = [
    {},
    {"spike": "binary", "memory_rule": "delta", "chunk_size": 3},
    {"go_gate": False, "lateral": False},
    {"token_shift": 4, "memory_rule": "delta"},
]


def ids(lanes: int, num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(11, (lanes, num_tokens), generator=torch.Generator().manual_seed(seed))


def assert_close_states(got: BrainState, expected: BrainState) -> None:
    for name, x in expected.tensors().items():
        torch.testing.assert_close(got.tensors()[name], x, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("pieces", [[13], [1] * 13, [5, 8], [1, 11, 1], [6, 0, 7]])
def test_a_sequence_is_any_of_its_splits(
    config: dict[str, Any], pieces: list[int], make_model: Callable[..., NeuroGen]
) -> None:
    model = make_model(**config)
    inputs = ids(3, 13)
    starts = torch.rand(3, 13, generator=torch.Generator().manual_seed(1)) < 0.2
    with torch.no_grad():
        whole = model(inputs, document_start=starts)
        state, logits = model.init_state(3), []
        for piece, start in zip(inputs.split(pieces, 1), starts.split(pieces, 1)):
            out = model(piece, state, document_start=start)
            state = out.state
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=0, atol=1e-10)
    assert_close_states(state, whole.state)
    assert whole.state.position.tolist() == [13] * 3


@pytest.mark.parametrize("config", KINDS)
def test_step_is_a_sequence_of_one(config: dict[str, Any], make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(**config)
    inputs = ids(2, 5)
    state = model.init_state(2)
    with torch.no_grad():
        whole = model(inputs)
        for t in range(5):
            logits, state = model.step(inputs[:, t], state)
            torch.testing.assert_close(logits, whole.logits[:, t], rtol=0, atol=1e-10)
    assert_close_states(state, whole.state)


@pytest.mark.parametrize("config", KINDS)
def test_packed_documents_are_separate_documents(config: dict[str, Any], make_model: Callable[..., NeuroGen]) -> None:
    """Three documents in one lane give what each gives alone, whatever the lane had read before."""
    model = make_model(**config)
    lengths = [4, 1, 6]
    documents = [ids(1, length, seed) for seed, length in enumerate(lengths)]
    starts = torch.zeros(1, 11, dtype=torch.bool)
    starts[0, [0, 4, 5]] = True
    with torch.no_grad():
        past = model(ids(1, 7, 9)).state
        packed = model(torch.cat(documents, 1), past, document_start=starts)
        alone = [model(document) for document in documents]
    torch.testing.assert_close(packed.logits, torch.cat([out.logits for out in alone], 1), rtol=0, atol=1e-10)
    for name, x in alone[-1].state.tensors().items():
        if name != "position":  # it numbers draws, and goes on
            torch.testing.assert_close(packed.state.tensors()[name], x, rtol=0, atol=1e-10, msg=name)
    assert packed.state.position.tolist() == [18]


def test_lanes_do_not_see_each_other(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(memory_rule="delta")
    inputs = ids(5, 6)
    with torch.no_grad():
        together = model(inputs).logits
        for lane in range(5):
            torch.testing.assert_close(model(inputs[lane : lane + 1]).logits[0], together[lane], rtol=0, atol=1e-10)


def test_the_future_is_not_seen(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(chunk_size=4)
    inputs = ids(1, 9)
    changed = inputs.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    with torch.no_grad():
        before, after = model(inputs).logits, model(changed).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


def test_everything_is_remembered(make_model: Callable[..., NeuroGen]) -> None:
    """The first token still shows at the last, through the carried state alone, in both kinds of layer."""
    for config in ({"wernicke_depth": 0, "broca_depth": 0}, {"hippocampus_depth": 0, "pfc_depth": 0}):
        model = make_model(**config)
        first, rest = ids(1, 1), ids(1, 7, 3)
        with torch.no_grad():
            other = model((first + 1) % 11).state
            one, two = (model(rest, state).logits[:, -1] for state in (model(first).state, other))
        assert (one - two).abs().max() > 1e-6


def test_no_tokens_leave_the_state(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model()
    state = model(ids(2, 3)).state
    out = model(torch.zeros(2, 0, dtype=torch.int64), state, target_ids=torch.zeros(2, 0, dtype=torch.int64))
    assert_close_states(out.state, state)
    assert float(out.loss.detach()) == 0
    assert int(out.num_targets) == 0
    assert model(torch.zeros(2, 0, dtype=torch.int64)).logits.shape == (2, 0, 11)


def test_loss_is_the_cross_entropy_of_the_logits(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model()
    inputs, targets = ids(2, 6), ids(2, 6, 1)
    targets[0, :2] = -100
    targets[1, 5] = -100
    with torch.no_grad():
        logits = model(inputs).logits
        out = model(inputs, target_ids=targets)
    losses, hits = [], 0
    for lane in range(2):
        for t in range(6):
            target = int(targets[lane, t])
            if target != -100:
                losses.append(float(torch.logsumexp(logits[lane, t], 0) - logits[lane, t, target]))
                hits += int(logits[lane, t].argmax()) == target
    assert out.logits is None
    assert float(out.loss) == pytest.approx(sum(losses) / 9, abs=1e-12)
    assert (int(out.num_correct), int(out.num_targets)) == (hits, 9)
    ignored = model(inputs, target_ids=torch.full_like(targets, -100))
    assert (float(ignored.loss.detach()), int(ignored.num_targets)) == (0.0, 0)


def test_a_new_network_knows_nothing() -> None:
    """Zero decoder: every token is equally likely, and the regions write nothing into the workspace."""
    model = NeuroGen(BrainConfig(embedding_dim=24, column_width=8, head_width=6), vocab_size=11)
    out = model(ids(2, 5), target_ids=ids(2, 5, 1))
    assert float(out.loss.detach()) == pytest.approx(torch.log(torch.tensor(11.0)).item(), abs=1e-6)
    with torch.no_grad():
        rows = model.embedding(ids(2, 5))
        broca = model.mode.sequence(model.brain, model.embedding, ids(2, 5), model.init_state(2), None).broca_output
    torch.testing.assert_close(broca, rows / rows.square().mean(-1, keepdim=True).add(model.config.norm_eps).sqrt())


@pytest.mark.parametrize("tie", [False, True])
def test_train_step_lowers_the_loss(tie: bool) -> None:
    torch.manual_seed(0)
    config = BrainConfig(embedding_dim=24, column_width=8, head_width=6, tie_embedding=tie)
    model = NeuroGen(config, vocab_size=11)
    inputs, targets = ids(2, 8), ids(2, 8, 1)
    steps = [model.train_step(inputs, targets) for _ in range(40)]
    assert all(isinstance(value, float) for step in steps for value in step)
    assert steps[-1][0] < 0.8 * steps[0][0]
    assert 0.0 <= steps[0][1] <= 1.0
    assert steps[-1][1] > steps[0][1]


def test_train_step_uses_the_optimiser_and_the_clip(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model()
    before = model.decoder.weight.detach().clone()
    model.set_optimizer(torch.optim.SGD(model.parameters(), lr=0.5), max_grad_norm=0.01)
    model.train_step(ids(2, 4), ids(2, 4, 1))
    moved = sum(float((p.grad**2).sum()) for p in model.parameters()) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(model.decoder.weight, before - 0.5 * model.decoder.weight.grad)


def test_a_tied_embedding_is_one_weight(make_model: Callable[..., NeuroGen]) -> None:
    tied, apart = make_model(tie_embedding=True), make_model()
    assert tied.decoder.weight is tied.embedding.weight
    assert apart.num_parameters() - tied.num_parameters() == 11 * 24
    assert tied.flops_per_token() == apart.flops_per_token()


def test_parameters_and_flops_counted_by_hand() -> None:
    config = BrainConfig(embedding_dim=128, column_width=64, head_width=32, hippocampus_depth=2, memory_rule="delta")
    model = NeuroGen(config, vocab_size=257)
    d, m, v, c, h, n = 128, 320, 257, 64, 4, 32
    mlp = 2 * d * m + m * d
    cortex_matrices = 2 * d * d + d * d + d * c + mlp  # in, out, the columns' lateral weights
    cortex = cortex_matrices + 2 * d  # drive bias and decay
    memory_matrices = 4 * d * d + d * d + 2 * d * h + mlp  # in, out, forget and write
    memory = memory_matrices + 2 * h
    go = d * 2
    assert model.num_parameters() == 2 * v * d + 4 * d + 2 * cortex + 3 * memory + go + 2
    matrices = 2 * cortex_matrices + 3 * memory_matrices + go + v * d
    assert model.flops_per_token() == 6 * matrices + 3 * 3 * 4 * d * n


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"input_ids has shape \(3,\)"),
        ({"target_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"target_ids has shape \(2, 3\) and input_ids \(2, 4\)"),
        ({"document_start": torch.zeros(2, 1, dtype=torch.bool)}, "document_start has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    arguments: dict[str, Tensor], message: str, make_model: Callable[..., NeuroGen]
) -> None:
    with pytest.raises(UserError, match=message):
        make_model()(**{"input_ids": ids(2, 4)} | arguments)


def test_a_state_of_other_lanes_is_refused(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model()
    with pytest.raises(UserError, match="the state has 3 lanes and input_ids 2"):
        model(ids(2, 4), model.init_state(3))


def test_health_counts_by_hand(make_model: Callable[..., NeuroGen]) -> None:
    """Against the spikes themselves, read from the state after every token."""
    model = make_model()
    inputs = ids(2, 6)
    state, spikes = model.init_state(2), []
    with torch.no_grad():
        for t in range(6):
            _, state = model.step(inputs[:, t], state)
            spikes.append(state.layers["wernicke.0"].spikes)
        health = model(inputs).health
    fired = torch.stack(spikes) > 0
    assert float(health["wernicke/firing_rate"]) == pytest.approx(float(fired.double().mean()))
    assert float(health["wernicke/silent"]) == pytest.approx(float((~fired).all(0).all(0).double().mean()))
    full = (torch.stack(spikes) >= 4.0).double().mean((0, 1))
    assert float(health["wernicke/saturated"]) == pytest.approx(float((full >= 0.5).double().mean()))
    assert 0.0 < float(health["go_rate"]) < 1.0
    assert "go_rate" not in make_model(go_gate=False)(inputs).health


def test_bfloat16_model_and_autocast_run(make_model: Callable[..., NeuroGen]) -> None:
    """Half precision comes near the float32 loss, and the state stays in float32."""
    inputs, targets = ids(2, 6), ids(2, 6, 1)
    single = make_model(dtype=torch.float32)
    expected = float(single(inputs, target_ids=targets).loss.detach())
    for mode in ("unfused", "naive", "preallocated"):
        half = make_model(dtype=torch.bfloat16, mode=mode)
        out = half(inputs, target_ids=targets)
        out.loss.backward()
        assert float(out.loss.detach()) == pytest.approx(expected, rel=0.05)
        assert out.state.layers["pfc.0"].fast_weight.dtype == torch.float32
        assert half.decoder.weight.grad.dtype == torch.bfloat16
        single.set_mode(mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = single(inputs, target_ids=targets)
        cast.loss.backward()
        assert float(cast.loss.detach()) == pytest.approx(expected, rel=0.05)
        assert cast.state.layers["pfc.0"].fast_weight.dtype == torch.float32
