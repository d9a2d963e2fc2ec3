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


class StreamBroken(UserError):
    """The hub or the way to it failed; what came before is sound."""


class HubReader:
    """The documents of `config.dataset` in the order of the hub, read as they are needed, from any position on.

    counts: what was read, skipped or replaced is added here, by reason.
    position: what `position` gave, to carry on after the document that was handed out last; None is the start.
    """

    def __init__(self, config: DataConfig, counts: Counter[str], position: dict[str, Any] | None = None) -> None:
        self._config = config
        self._counts = counts
        self._num_records: int = position["records"] if position else 0
        self._reader: dict[str, Any] | None = position["reader"] if position else None
        self._dataset: Any = None

    def documents(self) -> Iterator[Document]:
        """What is left from the position on.

        Raises UserError, in one line that says how to use local files, when the package is missing; its kind
        StreamBroken when the hub cannot be read; and as `iterate_documents` for records without text.
        """
        name = self._config.dataset
        for record in self._records():
            self._num_records += 1
            origin = f"{name} record {self._num_records}"
            text = text_of_record(record, origin, self._config, self._counts)
            if text is None:
                continue
            self._counts["documents"] += 1
            key = f"{name}:{self._num_records}"
            yield Document(key, origin, Path(name), lambda text=text: iter((text,)))  # type: ignore[misc]

    def position(self) -> dict[str, Any]:
        """Records read, and where the library's own reader is: with that it skips whole files instead of reading on."""
        reader = self._reader if self._dataset is None else self._dataset.state_dict()
        return {"records": self._num_records, "reader": reader}

    def _records(self) -> Iterator[Any]:
        config = self._config
        if config.dataset_mirror is not None:
            _use_mirror(config.dataset_mirror)
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"data=slimpajama streams with the package datasets, which is missing; {LOCAL_HINT}"
            ) from None
        # Both libraries warn of every attempt they repeat; what came of them all is one line below.
        for name in ("datasets", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            self._dataset = datasets.load_dataset(
                config.dataset, split=config.dataset_split, revision=config.dataset_revision, streaming=True
            )
            if self._reader is not None:
                self._dataset.load_state_dict(self._reader)
            yield from self._dataset
        except Exception as error:  # the library and its file systems raise many kinds, all meaning the same here
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise StreamBroken(f"cannot stream {config.dataset} ({reason}); {LOCAL_HINT}") from error


def _use_mirror(address: str) -> None:
    """The library reads where the hub is from the environment, once, when it is imported."""
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None and address != constants.ENDPOINT:  # type: ignore[attr-defined]
        raise UserError(
            f"data.dataset_mirror={address} comes too late: huggingface_hub is loaded for "
            f"{constants.ENDPOINT} already; set HF_ENDPOINT in the environment instead"  # type: ignore[attr-defined]
        )
    os.environ["HF_ENDPOINT"] = address
