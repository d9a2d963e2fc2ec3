"""The model a configuration names: ours, or one we compare with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from neurogen.baselines import GPT, LSTM, Baseline, GPTConfig, LSTMConfig
from neurogen.brain import BrainConfig
from neurogen.errors import UserError
from neurogen.model import NeuroGen
from neurogen.modes.select import select_mode

if TYPE_CHECKING:
    from neurogen.config.schema import ModeConfig
    from neurogen.training.precision import Precision

ModelConfig = BrainConfig | GPTConfig | LSTMConfig
LanguageModel = NeuroGen | Baseline


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    mode: ModeConfig,
    precision: Precision,
    starts_documents: bool,
    window: int,
    cache_dir: Path,
) -> LanguageModel:
    """A new model, still in float32 on the CPU.

    Arguments:
        mode: how a NeuroGen runs; the others have one way each.
        precision: what it will run in, see `select_mode`.
        starts_documents: whether the text marks where documents start; the baselines pay for minding it.
        window: tokens of a training window.
        cache_dir: where passed canaries are remembered.

    Raises:
        UserError: the mode cannot be had on this device, or not with this model.
    """
    if isinstance(config, BrainConfig):
        resolved = select_mode(
            mode.name,
            config,
            precision.device,
            precision.activations,
            cache_dir=cache_dir,
            on_canary_failure=mode.on_canary_failure,
        )
        return NeuroGen(config, vocab_size=vocab_size, mode=resolved)
    if mode.name != "auto":
        raise UserError(f"mode={mode.name}: modes are NeuroGen's; with model={config.name} use mode=auto")
    if isinstance(config, GPTConfig):
        return GPT(config, vocab_size=vocab_size, mask_documents=starts_documents, context=window)
    return LSTM(config, vocab_size=vocab_size, reset_inside=starts_documents)
