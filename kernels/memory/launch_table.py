"""Block sizes of the memory kernels, by type, head width, rule and the card's shared memory.

Those of the Hebbian rule in bfloat16 with much shared memory are the quickest of about 130 timed on an H100; the others
are chosen by what the compiler makes of each (registers, spills, shared memory, number of instructions).
"""

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """How one kernel is launched: value columns a program (or a step) works on, warps, pipeline stages, registers."""

    tile: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # a thread; fewer let more programs run on a multiprocessor

    def options(self) -> dict[str, int | None]:
        """What the compiler is told."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}


class LaunchTable(NamedTuple):
    """Launches of every kernel for one chunk length L."""

    length: int
    forward: Launch
    recompute: Launch  # the forward walk again, for the backward pass
    state_gradient: Launch
    gradient: Launch
    inverse: Launch = Launch(16, 4, 1)  # its tile is unused


def launch_table(dtype: torch.dtype, width: int, *, delta: bool, large_shared: bool) -> LaunchTable:
    """The launches for float32 or bfloat16 storage and a head width of 16, 32, 64 or 128.

    large_shared: whether a block may take the 227 KB of an H100 or H200; otherwise everything fits in 99 KB.
    """
    if dtype == torch.float32:
        # Products in full precision run outside the tensor cores and keep whole rows of both factors in registers.
        walk = Launch(16, 4, 1)
        forward = Launch(16, 8, 1) if delta and width == 128 else walk
        return LaunchTable(16, forward, forward, walk, Launch(16, 8 if width >= 32 else 4, 1))
    if width < 64:
        launch = Launch(width, 4, 2)
        return LaunchTable(32, launch, launch, launch, launch)
    return (_LARGE if large_shared else _SMALL)[width, delta]


# The gradient's programs hold 64 tokens in four warps: a product of 64 rows is one instruction of a warp group, and of
# two groups Triton gives both the same rows. Two programs share a multiprocessor at heads of 128, three at 64.
# Walks have three stages, since with two Triton loads a chunk after the work on the one before it.
_LARGE = {  # by head width and whether the rule is delta
    (64, False): LaunchTable(64, Launch(64, 4, 3), Launch(64, 4, 3, 128), Launch(64, 4, 3, 128), Launch(64, 4, 1)),
    (64, True): LaunchTable(64, Launch(64, 4, 3), Launch(64, 4, 3), Launch(64, 4, 3), Launch(64, 4, 1)),
    (128, False): LaunchTable(64, Launch(128, 8, 2), Launch(128, 8, 3), Launch(128, 8, 3), Launch(128, 4, 1)),
    (128, True): LaunchTable(64, Launch(128, 8, 3), Launch(128, 8, 3), Launch(128, 8, 3), Launch(128, 4, 1)),
}
_SMALL = {
    (64, False): LaunchTable(32, Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 1)),
    (64, True): LaunchTable(32, Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 1)),
    (128, False): LaunchTable(32, Launch(64, 8, 2), Launch(64, 8, 2), Launch(64, 8, 2), Launch(64, 4, 1)),
    (128, True): LaunchTable(32, Launch(32, 4, 2), Launch(64, 8, 2), Launch(64, 8, 2), Launch(64, 4, 1)),
}
