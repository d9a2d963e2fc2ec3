"""Which batches a configuration asks for."""

from __future__ import annotations

from typing import Any

from neurogen.data.batches import Batches, LaneBatches, RandomBatches
from neurogen.data.config import DataConfig
from neurogen.data.mixture import MixtureBatches, MixtureStream
from neurogen.data.shuffle import ShuffledLaneBatches
from neurogen.data.stream import TokenStream


def make_batches(stream: TokenStream, config: DataConfig, *, seed: int, rank: int = 0, world_size: int = 1) -> Batches:
    """The endless batches that `config` asks for (batching, lanes, window) from `stream`."""
    shape: dict[str, Any] = {
        "lanes": config.lanes,
        "window": config.window,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
    }
    if isinstance(stream, MixtureStream):
        return MixtureBatches(stream, shuffle=config.shuffle, **shape)
    carried = ShuffledLaneBatches if config.shuffle else LaneBatches
    kind: type[Batches] = carried if config.batching == "lanes" else RandomBatches
    return kind(stream, **shape)
