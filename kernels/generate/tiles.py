"""Tile sizes of the launch, by lanes, type and programs; what a GPU session tunes."""

from dataclasses import asdict, dataclass

import torch
import triton

from kernels.generate.layout import BrainShape


@dataclass(frozen=True)
class Tiles:
    """Constants of the launch.

    Arguments:
        BL: lanes, padded. BK, BM: channels of a tile of width D and M. BD, BV, BP: D, ids and programs at once, padded.
        BR_PAIR, BR_MEMORY, BR_OUT, BR_MLP, BR_DECODE: rows of a tile in each kind of phase.
        DOT: whether products are matrix products over lanes. STAGES: tiles in flight.
        LINES: cache lines of 128 bytes a program prefetches for the next phase before a barrier; 0 for none.
    """

    BL: int
    BR_PAIR: int
    BR_MEMORY: int
    BR_OUT: int
    BR_MLP: int
    BR_DECODE: int
    BK: int
    BM: int
    BD: int
    BV: int
    BP: int
    DOT: bool
    STAGES: int
    LINES: int
    num_warps: int = 8

    def constexprs(self) -> dict[str, int | bool]:
        """Keyword arguments of the kernel."""
        constants = asdict(self)
        del constants["num_warps"]
        return constants


# (lanes padded, bytes of a weight): channels of a tile, rows at most (single, pair), stages.
_TABLE = {
    (1, 2): (256, 64, 32, 4),
    (1, 4): (256, 16, 16, 3),
    (16, 2): (128, 32, 32, 4),
    (16, 4): (64, 32, 16, 2),
    (32, 2): (128, 32, 32, 3),
    (32, 4): (64, 16, 16, 2),
    (64, 2): (128, 32, 16, 2),
    (64, 4): (64, 16, 16, 2),
}
_INTERPRETED_TILE = 512
_PREFETCH_LINES = 512  # 64 KB a program, about two microseconds of a card's memory rate


def choose_tiles(
    shape: BrainShape, num_lanes: int, dtype: torch.dtype, num_programs: int, *, lines: int = _PREFETCH_LINES
) -> Tiles:
    """Tiles for a brain: rows of a tile are just enough for a program's share of a phase, up to a limit."""
    dot = num_lanes > 1
    padded_lanes = max(16, triton.next_power_of_2(num_lanes)) if dot else 1
    channels, most_rows, most_pairs, stages = _TABLE[padded_lanes, dtype.itemsize]
    if num_programs == 1:
        # The interpreter takes as long for a large tile as for a small one.
        channels = most_rows = most_pairs = _INTERPRETED_TILE

    def rows(total: int, most: int) -> int:
        each = triton.next_power_of_2(triton.cdiv(total, num_programs))
        return min(max(each, 16 if dot else 4), most)

    def tile(width: int) -> int:
        return min(max(channels, shape.column_width), triton.next_power_of_2(width))

    return Tiles(
        BL=padded_lanes,
        BR_PAIR=rows(shape.width, min(most_pairs, shape.column_width)),
        BR_MEMORY=rows(4 * shape.width, most_rows),
        BR_OUT=rows(shape.width, most_rows),
        BR_MLP=rows(shape.mlp_width, most_pairs),
        BR_DECODE=rows(shape.vocab_size, most_rows),
        BK=tile(shape.width),
        BM=tile(shape.mlp_width),
        BD=triton.next_power_of_2(shape.width),
        BV=min(2048, triton.next_power_of_2(shape.vocab_size)),
        BP=triton.next_power_of_2(num_programs),
        DOT=dot,
        STAGES=stages,
        LINES=0 if num_programs == 1 else lines,
    )
