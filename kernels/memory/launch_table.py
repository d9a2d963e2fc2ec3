"""Block sizes of the memory kernels, by type, head width and the card's shared memory."""

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """How one kernel is launched: value columns a program (or a step) works on, warps, pipeline stages."""

    tile: int
    num_warps: int
    num_stages: int


class LaunchTable(NamedTuple):
    """Launches of every kernel for one chunk length L."""

    length: int
    inverse: Launch  # its tile is unused
    forward: Launch
    state_gradient: Launch
    gradient: Launch


def launch_table(dtype: torch.dtype, width: int, *, delta: bool, large_shared: bool) -> LaunchTable:
    """The launches for float32 or bfloat16 storage and a head width of 16, 32, 64 or 128.

    large_shared: whether a block may take the 227 KB of an H100 or H200; otherwise everything fits in 99 KB.
    """
    if dtype == torch.float32:
        # Products in full precision run outside the tensor cores and keep whole rows of both factors in registers.
        tile = 16
        return LaunchTable(16, Launch(tile, 4, 1), Launch(tile, 4, 1), Launch(tile, 4, 1), Launch(tile, 4, 1))
    tile = min(width, 64)
    half = min(width, 32)
    length = 64
    if not large_shared:
        length = 32
    warps = 8 if width == 128 else 4
    return LaunchTable(
        length,
        Launch(tile, 4, 1),
        Launch(tile, 4, 2),
        Launch(tile, 4, 2),
        Launch(half, warps, 2),
    )
