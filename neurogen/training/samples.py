"""Text samples while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from neurogen.data import Tokenizer
from neurogen.training.precision import Precision

if TYPE_CHECKING:
    from neurogen.models import LanguageModel


def encode_prompt(tokenizer: Tokenizer, text: str, *, starts_documents: bool) -> torch.Tensor:
    """Ids `[1, T]` of a prompt, T >= 1.

    starts_documents: begin with the document-start id, as the model's training text did. A model trained on running
    text never saw that id, and an empty prompt is a line feed to it.
    """
    ids = tokenizer.encode(text if text or starts_documents else "\n").astype(np.int64)
    if starts_documents:
        ids = np.concatenate([[tokenizer.document_start_id], ids])
    return torch.from_numpy(ids)[None]


def sample_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    precision: Precision,
    starts_documents: bool,
) -> list[dict[str, str]]:
    """Continue each prompt: `[{"prompt": ..., "text": what follows}]`. Stops where the model ends its document.

    Draws are keyed by `seed`, apart from every global generator, so sampling leaves training as it is.
    """
    rows = []
    for prompt in prompts:
        with precision.autocast():
            reply = model.generate(
                encode_prompt(tokenizer, prompt, starts_documents=starts_documents),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or 1.0,
                seed=seed,
                stop=[tokenizer.document_start_id] if starts_documents else [],
            )
        rows.append({"prompt": prompt, "text": tokenizer.decode(reply.tokens[0, : int(reply.lengths[0])].tolist())})
    return rows


def format_samples(rows: Sequence[dict[str, str]]) -> str:
    """Samples as one readable text."""
    return "\n\n".join(f"--- prompt: {row['prompt']!r}\n{row['prompt']}{row['text']}" for row in rows) + "\n"
