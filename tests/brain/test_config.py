"""What a brain may look like."""

from typing import Any

import pytest

from neurogen import BrainConfig, NeuroGen, UserError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_dim": 0}, "model.embedding_dim is 0; it must be at least 1"),
        ({"column_width": 48}, "model.embedding_dim is 128, not a multiple of model.column_width = 48"),
        ({"head_width": 60}, "not a multiple of model.head_width = 60"),
        ({"column_width": 0}, "model.column_width is 0"),
        ({"chunk_size": 0}, "model.chunk_size is 0"),
        ({"broca_depth": -1}, "model.broca_depth is -1; it must be 0 or more"),
        ({"spike": "loud"}, "model.spike is 'loud'; choose one of graded, binary, smooth"),
        ({"spike": "smooth"}, "model.homeostasis is 0.03; a smooth unit fires at no rate to be kept: set it to 0"),
        ({"memory_rule": "oja"}, "model.memory_rule is 'oja'; choose one of hebbian, delta"),
        ({"adaptation_decay": 1.0}, "model.adaptation_decay is 1.0"),
        ({"adaptation_decay": -0.1}, "model.adaptation_decay is -0.1"),
        ({"mlp_ratio": 0.0}, "model.mlp_ratio is 0.0; it must be above 0"),
        ({"norm_eps": 0.0}, "model.norm_eps is 0.0"),
    ],
)
def test_refuses_what_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        BrainConfig(**change)
    assert "\n" not in str(error.value)


def test_derived_sizes() -> None:
    config = BrainConfig(embedding_dim=1536, column_width=128, head_width=64, hippocampus_depth=2)
    assert (config.num_columns, config.num_heads) == (12, 24)
    assert config.mlp_width == 4096
    assert BrainConfig(embedding_dim=512).mlp_width == 1344  # 8 * 512 / 3 = 1365.3, and 21.3 * 64
    assert BrainConfig(embedding_dim=8, column_width=8, head_width=8).mlp_width == 64
    assert config.layer_names() == ["wernicke.0", "hippocampus.0", "hippocampus.1", "pfc.0", "broca.0"]


def test_a_model_needs_two_tokens() -> None:
    with pytest.raises(UserError, match="vocab_size is 1"):
        NeuroGen(BrainConfig(embedding_dim=8, column_width=8, head_width=8), vocab_size=1)
