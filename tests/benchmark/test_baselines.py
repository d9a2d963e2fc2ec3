"""The models we compare with are what they are called."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from neurogen.baselines import GPT, LSTM, GPTConfig, KeyValueCache, LSTMConfig, decode_step
from neurogen.baselines.gpt import rotary_angles, rotate
from neurogen.brain import BrainState
from neurogen.config.compose import compose_config
from neurogen.config.schema import ModeConfig
from neurogen.errors import UserError
from neurogen.models import build_model
from neurogen.training.metrics import read_metrics
from neurogen.training.precision import Precision
from neurogen.training.run import train
from neurogen.training.trained import load_trained

CONFIG = GPTConfig(32, 2, 16)


def awake_gpt():
    torch.manual_seed(0)
    model = GPT(CONFIG, vocab_size=11).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_gpt_is_causal():
    model, ids = awake_gpt(), torch.randint(0, 11, (2, 7))
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-12)
    assert (before[:, 4:] - after[:, 4:]).abs().amax(-1).min() > 1e-6


def test_rotation_depends_on_distance_alone():
    angles = rotary_angles(9, 16, torch.device("cpu"))
    query, key = torch.randn(16), torch.randn(16)
    scores = rotate(query.expand(9, 16), angles) @ rotate(key.expand(9, 16), angles).T
    torch.testing.assert_close(scores[2, 5], scores[4, 7])
    torch.testing.assert_close(scores[3, 3], query @ key)
    assert not torch.isclose(scores[2, 5], scores[2, 6])


@pytest.mark.parametrize("model", [GPT(CONFIG, vocab_size=11), LSTM(LSTMConfig(32, 24, 2), vocab_size=11)])
def test_loss_is_the_mean_over_targets_that_count(model):
    ids, targets = torch.randint(0, 11, (2, 5)), torch.randint(0, 11, (2, 5))
    targets[0, :2] = -100
    log_probs = model(ids).logits.double().log_softmax(-1)
    counted = targets != -100
    expected = -log_probs[counted].gather(-1, targets[counted][:, None]).mean()
    out = model(ids, target_ids=targets)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=0)
    assert int(out.num_correct) == int((log_probs.argmax(-1) == targets)[counted].sum())
    assert int(out.num_targets) == 8


def test_a_new_gpt_knows_nothing():
    ids = torch.randint(0, 11, (1, 4))
    loss = GPT(CONFIG, vocab_size=11)(ids, target_ids=ids).loss
    assert loss.item() == pytest.approx(math.log(11), rel=1e-5)


def test_gpt_parameters_by_hand():
    hidden = 64  # round64(8/3 * 32)
    layer = 3 * 32 * 32 + 32 * 32 + 2 * 32 * hidden + hidden * 32
    assert GPT(CONFIG, vocab_size=11).num_parameters() == 2 * layer + 2 * 11 * 32


@pytest.mark.parametrize("sizes", [{"num_layers": 0}, {"head_width": 15}, {"head_width": 24}])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(UserError, match=next(iter(sizes))):
        GPTConfig(**({"embedding_dim": 32, "num_layers": 2, "head_width": 16} | sizes))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("lanes", "capacity"), [(1, 9), (3, 7)])
def test_a_gpt_with_a_cache_is_the_gpt(lanes, capacity, fused):
    """Filled to the last place, and with rubbish behind it that no step may look at."""
    model, ids = awake_gpt(), torch.randint(0, 11, (lanes, 7))
    cache = KeyValueCache.empty(model, lanes, capacity)
    for buffer in (*cache.keys, *cache.values):
        buffer.fill_(1e3)
    with torch.no_grad():
        steps = [decode_step(model, ids[:, t], torch.tensor(t), cache, fused=fused) for t in range(7)]
        expected = model(ids).logits
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=1e-6, atol=1e-6)
    assert cache.bytes_read(3) == 2 * 2 * lanes * 32 * 3 * 8


def test_a_cache_for_nothing_is_refused():
    with pytest.raises(UserError, match="capacity is 0"):
        KeyValueCache.empty(awake_gpt(), 1, 0)


def awake_lstm(**settings):
    torch.manual_seed(0)
    model = LSTM(LSTMConfig(8, 6, 2), vocab_size=11, **settings).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


STARTS = torch.tensor([[0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0, 0]]).bool()


@pytest.mark.parametrize("make", [awake_gpt, awake_lstm])
def test_documents_do_not_see_each_other(make):
    model, ids = make(), torch.randint(0, 11, (2, 7))
    packed = model(ids, document_start=STARTS).logits
    for lane, pieces in enumerate(((0, 2, 6, 7), (0, 4, 7))):
        for start, end in pairwise(pieces):
            alone = model(ids[lane : lane + 1, start:end]).logits[0]
            torch.testing.assert_close(packed[lane, start:end], alone, rtol=1e-4, atol=1e-6)  # angles are float32
    assert (packed - model(ids).logits).abs().max() > 1e-6


def test_the_lstm_carries_its_state_and_the_gpt_none():
    ids = torch.randint(0, 11, (2, 7))
    for model, carries in ((awake_lstm(), True), (awake_gpt(), False)):
        whole, first = model(ids), model(ids[:, :3])
        second = model(ids[:, 3:], first.state)
        assert torch.allclose(second.logits, whole.logits[:, 3:], rtol=1e-9, atol=1e-12) is carries
        assert second.state.position.tolist() == [7, 7]
        flat = second.state.tensors()
        assert BrainState.from_tensors(flat).tensors().keys() == flat.keys()
        if carries:
            torch.testing.assert_close(flat["lstm.cell"], whole.state.tensors()["lstm.cell"])


def test_text_without_document_marks_resets_a_window_at_its_first_token_alone():
    model, ids = awake_lstm(reset_inside=False), torch.randint(0, 11, (2, 7))
    state = model(ids).state
    got = model(ids, state, document_start=STARTS).logits
    torch.testing.assert_close(got[1], model(ids).logits[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[0], model(ids, state).logits[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [awake_gpt, awake_lstm])
def test_generation_is_the_arg_max_of_the_whole_text(make):
    model, prompt = make(), torch.randint(0, 11, (3, 4))
    reply = model.generate(prompt, max_new_tokens=6, do_sample=False)
    text = torch.cat([prompt, reply.tokens], dim=1)
    logits = model(text).logits[:, 3:-1]
    assert torch.equal(logits.argmax(-1), reply.tokens)
    log_probs = logits.float().log_softmax(-1).amax(-1)
    torch.testing.assert_close(reply.log_probs, log_probs)
    stop = int(reply.tokens[0, 2])
    stopped = model.generate(prompt, max_new_tokens=6, do_sample=False, stop=[stop])
    length = int((reply.tokens[0] == stop).nonzero()[0, 0]) + 1
    assert int(stopped.lengths[0]) == length
    assert stopped.tokens[0, length - 1 :].tolist() == [stop] * (7 - length)
    assert int(stopped.state.position[0]) == 4 + length - 1


def test_sampling_follows_the_seed():
    model, prompt = awake_lstm(), torch.zeros(2, 1, dtype=torch.int64)
    one, same, other = (model.generate(prompt, max_new_tokens=12, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_flops_count_products():
    gpt = GPT(CONFIG, vocab_size=11, context=10)
    matrices = gpt.num_parameters() - 11 * 32
    assert gpt.flops_per_token() == 6 * matrices + 3 * 2 * (2 * 10 // 2) * 2 * 32  # causal scores and reads, 2 layers
    first, second = 4 * 24 * (32 + 24), 4 * 24 * (24 + 24)
    assert LSTM(LSTMConfig(32, 24, 2), vocab_size=11).flops_per_token() == 6 * (first + second + 11 * 24)


@pytest.mark.parametrize("name", ["gpt", "lstm"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_trainer_trains_evaluates_and_resumes_them(name, optimizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEUROGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("neurogen.training.recorder.plot_run", lambda path: [])
    for number in range(6):
        (tmp_path / f"file{number}.txt").write_text(f"a line of file {number}\n" * 20)
    tiny = {"gpt": ["model.num_layers=1", "model.head_width=8"], "lstm": ["model.hidden_dim=16"]}[name]
    command = ["data=text", "data.path=file*.txt", "data.validation_fraction=0.2", "data.lanes=4", "data.window=16"]
    command += [f"model={name}", "model.embedding_dim=16", *tiny, f"optimizer={optimizer}", "logger=none"]
    command += ["trainer.device=cpu", "trainer.max_steps=6", "trainer.evaluate_every=0", "trainer.sample_every=0"]
    command += ["trainer.sample_tokens=3", "trainer.checkpoint_every=0", "trainer.log_every=1", "optimizer.lr=1e-2"]
    train(compose_config([*command, "run_dir=whole"]))
    train(compose_config([*command, "run_dir=parts", "trainer.stop_at_step=3"]))
    train(compose_config([*command, "resume=parts"]))
    whole, parts = (read_metrics(f"{run}/metrics.jsonl") for run in ("whole", "parts"))
    assert [row["train/loss"] for row in whole] == [row["train/loss"] for row in parts]
    assert whole[-1]["train/loss"] < whole[0]["train/loss"]
    assert whole[-1]["val/loss"] == parts[-1]["val/loss"]
    trained = load_trained("whole", mode=ModeConfig(), device="cpu", dtype="float32")
    assert type(trained.model).__name__.lower() == name
    with pytest.raises(UserError, match="mode=fused: modes are NeuroGen's"):
        load_trained("whole", mode=ModeConfig("fused"), device="cpu", dtype="float32")
    with pytest.raises(UserError, match="learning=local"):
        train(compose_config([*command, "run_dir=local", "learning=local"]))


def test_configured_sizes_are_the_brains_of_model_small():
    sizes = {}
    for name in ("small", "gpt", "lstm"):
        config = compose_config([f"model={name}"])
        place = Precision(torch.device("cpu"), "float32")
        with torch.device("meta"):
            model = build_model(
                config.model,
                vocab_size=257,
                mode=config.mode,
                precision=place,
                starts_documents=True,
                window=512,
                cache_dir=Path("unused"),
            )
        sizes[name] = model.num_parameters()
    assert all(18.5e6 < size < 19.6e6 for size in sizes.values()), sizes
