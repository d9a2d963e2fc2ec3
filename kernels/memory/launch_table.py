"""Block sizes of the memory kernels, by type, head width, rule and the card's shared memory.

Those in bfloat16 for heads of 64 and 128 with much shared memory are the quickest of about 290 timed on an H100; the
others are chosen by what the compiler makes of each (registers, spills, shared memory, number of instructions).
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


class ParallelTable(NamedTuple):
    """Launches for few lanes, where every chunk runs in parallel (`chunk_parallel`)."""

    sum: Launch
    output: Launch
    walk: Launch  # its tile is elements of a state
    gradient: Launch | None  # where there are fewer chunks than multiprocessors; None is that of `LaunchTable`


def parallel_table(width: int, *, large_shared: bool) -> ParallelTable:
    """The launches for a head width of 16, 32, 64 or 128; chosen by what the compiler makes of each, not timed.

    A program has a multiprocessor to itself, so eight warps share what four would do one after the other.
    """
    launch = Launch(width, 8 if width >= 64 else 4, 1)
    # Four numbers a thread: a load of float32 and a store of bfloat16 then have one layout.
    walk = Launch(min(width * width, 512), 4, 1)
    return ParallelTable(launch, launch, walk, launch if width >= 64 and large_shared else None)


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
# two groups Triton gives both the same rows. Two programs share a multiprocessor at heads of 128, three at 64. The
# delta rule's triangular systems of 64 tokens cost more than what longer chunks save.
_LARGE = {  # by head width and whether the rule is delta
    (64, False): LaunchTable(64, Launch(64, 4, 3), Launch(64, 4, 3, 128), Launch(64, 4, 3, 128), Launch(64, 4, 1)),
    (64, True): LaunchTable(
        32, Launch(64, 4, 2, 168), Launch(64, 4, 2), Launch(64, 4, 2, 168), Launch(64, 4, 1), Launch(16, 2, 1)
    ),
    (128, False): LaunchTable(64, Launch(128, 8, 2), Launch(128, 8, 3), Launch(128, 8, 3), Launch(128, 4, 1)),
    (128, True): LaunchTable(
        32, Launch(128, 8, 2), Launch(128, 8, 2), Launch(128, 8, 2), Launch(128, 4, 1), Launch(16, 2, 1)
    ),
}
_SMALL = {
    (64, False): LaunchTable(32, Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 1)),
    (64, True): LaunchTable(32, Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 1)),
    (128, False): LaunchTable(32, Launch(64, 8, 2), Launch(64, 8, 2), Launch(64, 8, 2), Launch(64, 4, 1)),
    (128, True): LaunchTable(32, Launch(32, 4, 2), Launch(64, 8, 2), Launch(64, 8, 2), Launch(64, 4, 1)),
}
