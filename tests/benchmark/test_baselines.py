"""The models we compare with are what they are called."""

import math

import pytest
import torch

from neurogen.baselines import GPT, LSTM, GPTConfig, KeyValueCache, decode_step
from neurogen.baselines.gpt import rotary_angles, rotate
from neurogen.errors import UserError

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
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-12)
    assert (before[:, 4:] - after[:, 4:]).abs().amax(-1).min() > 1e-6


def test_rotation_depends_on_distance_alone():
    angles = rotary_angles(9, 16, torch.device("cpu"))
    query, key = torch.randn(16), torch.randn(16)
    scores = rotate(query.expand(9, 16), angles) @ rotate(key.expand(9, 16), angles).T
    torch.testing.assert_close(scores[2, 5], scores[4, 7])
    torch.testing.assert_close(scores[3, 3], query @ key)
    assert not torch.isclose(scores[2, 5], scores[2, 6])


@pytest.mark.parametrize("model", [GPT(CONFIG, vocab_size=11), LSTM(embedding_dim=32, num_layers=2, vocab_size=11)])
def test_loss_is_the_mean_over_targets_that_count(model):
    ids, targets = torch.randint(0, 11, (2, 5)), torch.randint(0, 11, (2, 5))
    targets[0, :2] = -100
    log_probs = model(ids).double().log_softmax(-1)
    counted = targets != -100
    expected = -log_probs[counted].gather(-1, targets[counted][:, None]).mean()
    torch.testing.assert_close(model(ids, targets).double(), expected, rtol=1e-5, atol=0)


def test_a_new_gpt_knows_nothing():
    loss = GPT(CONFIG, vocab_size=11)(torch.randint(0, 11, (1, 4)), torch.randint(0, 11, (1, 4)))
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
        expected = model(ids)
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=1e-6, atol=1e-6)
    assert cache.bytes_read(3) == 2 * 2 * lanes * 32 * 3 * 8


def test_a_cache_for_nothing_is_refused():
    with pytest.raises(UserError, match="capacity is 0"):
        KeyValueCache.empty(awake_gpt(), 1, 0)
