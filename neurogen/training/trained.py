"""A trained model from its checkpoint: what evaluation and generation start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neurogen.config.compose import build_config
from neurogen.config.schema import Config, ModeConfig
from neurogen.data import Tokenizer, load_tokenizer
from neurogen.data.config import default_cache_dir
from neurogen.errors import UserError
from neurogen.model import NeuroGen
from neurogen.models import LanguageModel, build_model
from neurogen.training.checkpoint import load_checkpoint
from neurogen.training.precision import Precision, resolve_device
from neurogen.training.session import load_weights


@dataclass(frozen=True)
class Trained:
    """A model ready to run, in evaluation mode, and what it was trained with.

    Arguments:
        path: the checkpoint's folder.
        step: optimiser steps behind it.
        starts_documents: whether its training text marked document starts.
    """

    path: Path
    step: int
    config: Config
    model: LanguageModel
    tokenizer: Tokenizer
    precision: Precision
    starts_documents: bool

    def brain(self) -> NeuroGen:
        """The model, which has to be a NeuroGen. Raises UserError for one of the models it is compared with."""
        if not isinstance(self.model, NeuroGen):
            raise UserError(f"{self.path}: holds a {type(self.model).__name__}; replies are written by a brain alone")
        return self.model


def load_trained(path: str, *, mode: ModeConfig, device: str, dtype: str) -> Trained:
    """Load a checkpoint, or the newest one of a run directory.

    Arguments:
        mode, device, dtype: as the configuration spells them, auto included.

    Raises UserError, one line, if there is no checkpoint, it is damaged, or its tokenizer and its weights disagree on
    the vocabulary.
    """
    if not path:
        raise UserError("checkpoint is empty; give a run directory or a checkpoints/step-... folder")
    precision = Precision.resolve(resolve_device(device), dtype)
    checkpoint = load_checkpoint(path)
    if checkpoint.tokenizer_dir is None or "config" not in checkpoint.metadata:
        raise UserError(f"{checkpoint.path}: has no tokenizer or configuration; give one that scripts/train.py saved")
    config = build_config(checkpoint.metadata["config"], Config)
    tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
    rows = checkpoint.model_tensors["embedding.weight"].shape[0]
    if rows != tokenizer.vocab_size or tokenizer.fingerprint != checkpoint.metadata["tokenizer_fingerprint"]:
        raise UserError(
            f"{checkpoint.path}: its tokenizer ({tokenizer.vocab_size} ids) is not the one its weights were "
            f"trained with ({rows} ids); use the checkpoint as it was saved"
        )
    starts_documents = bool(checkpoint.metadata["starts_documents"])
    model = build_model(
        config.model,
        vocab_size=rows,
        mode=mode,
        precision=precision,
        starts_documents=starts_documents,
        window=config.data.window,
        cache_dir=default_cache_dir(),
    )
    load_weights(model, checkpoint)
    precision.place(model)
    model.eval()
    return Trained(checkpoint.path, checkpoint.step, config, model, tokenizer, precision, starts_documents)
