"""Documents streamed from the Hugging Face hub. Needs the optional package `datasets` and a network."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neurogen.data.config import DataConfig
from neurogen.data.documents import Document, text_of_record
from neurogen.errors import UserError

LOCAL_HINT = "to read local files instead, set data.path, e.g. data.path='/data/slimpajama/*.jsonl.zst'"


def hub_documents(config: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """The documents of `config.dataset` in the order of the hub, read as they are needed.

    Raises UserError, in one line that says how to use local files, when the package or the network is missing; and as
    `iterate_documents` for records without text.
    """
    for number, record in enumerate(_records(config), start=1):
        origin = f"{config.dataset} record {number}"
        text = text_of_record(record, origin, config, counts)
        if text is None:
            continue
        counts["documents"] += 1
        yield Document(
            f"{config.dataset}:{number}",
            origin,
            Path(config.dataset),
            lambda text=text: iter((text,)),  # type: ignore[misc]
        )


def _records(config: DataConfig) -> Iterator[Any]:
    if config.dataset_mirror is not None:
        _use_mirror(config.dataset_mirror)
    try:
        import datasets
    except ImportError:
        raise UserError(f"data=slimpajama streams with the package datasets, which is missing; {LOCAL_HINT}") from None
    # Both libraries warn of every attempt they repeat; what came of them all is one line below.
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield from datasets.load_dataset(
            config.dataset, split=config.dataset_split, revision=config.dataset_revision, streaming=True
        )
    except Exception as error:  # the library and its file systems raise many kinds, all meaning the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot stream {config.dataset} ({reason}); {LOCAL_HINT}") from error


def _use_mirror(address: str) -> None:
    """The library reads where the hub is from the environment, once, when it is imported."""
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None and address != constants.ENDPOINT:  # type: ignore[attr-defined]
        raise UserError(
            f"data.dataset_mirror={address} comes too late: huggingface_hub is loaded for "
            f"{constants.ENDPOINT} already; set HF_ENDPOINT in the environment instead"  # type: ignore[attr-defined]
        )
    os.environ["HF_ENDPOINT"] = address
