"""Tile sizes of the launch, by lanes, type and programs; what a GPU session tunes."""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import functools
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
import triton

from kernels.generate.activations import room_bytes
from kernels.generate.layout import BrainShape
from kernels.generate.asking import GRANULE_BYTES, ROWS_OF_WARP
from kernels.generate.ring import ring_bytes
from kernels.generate.turns import TurnTable, turn_table


_NUM_WARPS = 8


class Block(NamedTuple):
    """A tile of weights: rows (of a pair of matrices, of each), slices of channels, channels of a slice, and stages of
    the loop over tiles (1: none is fetched ahead). With one slice all warps share a product, with more each has its
    own."""

    rows: int
    slices: int
    channels: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Constants of the launch for several lanes.

    Arguments:
        BL: lanes, padded. GROUPS: groups of programs that divide them in the phases that add to x.
        PAIR, OUT, MEMORY, MLP, DECODE: tiles of a cortex layer's input, of what adds to x, of a memory layer's input,
            of a SwiGLU's input and of the decoder.
        CU: value channels of a head that are one unit of memory.
        BD, BV, BP, BQ: D, ids, programs and programs of a group at once, padded.
        LINES: cache lines of 128 bytes a program prefetches for the next phase before a barrier; 0 for none.
    """

    BL: int
    GROUPS: int
    PAIR: Block
    OUT: Block
    MEMORY: Block
    MLP: Block
    DECODE: Block
    CU: int
    BD: int
    BV: int
    BP: int
    BQ: int
    LINES: int
    num_warps: int = _NUM_WARPS

    def constexprs(self) -> dict[str, int]:
        """Keyword arguments of the kernel: a block's as BR_, NB_, KS_ and ST_ with its name."""
        constants: dict[str, int] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Block):
                constants |= {f"{part}_{field.name}": n for part, n in zip(("BR", "NB", "KS", "ST"), value)}
            elif field.name != "num_warps":
                constants[field.name] = value
        return constants


_INTERPRETED_TILE = 512
_PREFETCH_LINES = 512  # 64 KB a program, about two microseconds of a card's memory rate
_WARPGROUP_ROWS = 64  # of a product that a warpgroup makes
_MANY_LANES = 32  # from here on a sum over warps costs more than sharing a product saves


def _block(rows: int, pair: bool, lanes: int, width: int, group: int, itemsize: int, ring_bytes: int) -> Block:
    """The tile for at most `rows` rows of a program, whose slices must lie in a group of channels."""
    all_rows = 2 * rows if pair else rows
    padded = triton.next_power_of_2(width)
    if itemsize == 4:
        slices, channels, most = 1, min(64, group, padded), 2
    elif all_rows < _WARPGROUP_ROWS and lanes < _MANY_LANES:
        slices, channels, most = 8, min(64, group, max(16, padded // 8)), 4
    else:
        slices, channels, most = 1, min(128, group, padded), 6
    stage_bytes = (all_rows + lanes) * slices * channels * itemsize
    while stage_bytes * 2 > ring_bytes and channels > 16:
        channels, stage_bytes = channels // 2, stage_bytes // 2
    # Only copies of 16 bytes a thread go past the first-level cache, as what other programs wrote has to.
    is_past = lanes * slices * channels * itemsize >= 16 * 32 * _NUM_WARPS
    return Block(rows, slices, channels, max(2, min(most, ring_bytes // stage_bytes)) if is_past else 1)


def choose_tiles(
    shape: BrainShape,
    num_lanes: int,
    dtype: torch.dtype,
    num_programs: int,
    *,
    lines: int = _PREFETCH_LINES,
    shared_bytes: int = 227 * 1024,
) -> Tiles:
    """Tiles for a brain: rows of a tile are just enough for a program's share of a phase, up to a limit."""
    padded_lanes = max(16, triton.next_power_of_2(num_lanes))
    interpreted, exact = num_programs == 1, dtype.itemsize == 4
    groups = 2 if padded_lanes == 64 and num_programs > 1 else 1
    group = min(shape.column_width, shape.head_width)

    def block(total: int, most: int, *, width: int = shape.width, pair: bool = False, out: bool = False) -> Block:
        most = min(most, 16 if pair else 32) if exact else most
        if interpreted:
            # The interpreter takes as long for a large tile as for a small one.
            channels = min(64, group, triton.next_power_of_2(width))
            return Block(min(_INTERPRETED_TILE, most), max(1, _INTERPRETED_TILE // channels), channels, 2)
        each = triton.next_power_of_2(triton.cdiv(total, num_programs // (groups if out else 1)))
        lanes = padded_lanes // (groups if out else 1)
        rows = min(max(each, 16), most)
        return _block(rows, pair, lanes, width, group if out else 256, dtype.itemsize, shared_bytes * 6 // 7)

    most = _INTERPRETED_TILE if interpreted else 64
    unit = min(shape.head_width, 64)
    while unit > 16 and num_lanes * shape.width < num_programs * unit:
        unit //= 2
    return Tiles(
        BL=padded_lanes,
        GROUPS=groups,
        PAIR=block(shape.width, min(16, shape.column_width), pair=True),
        OUT=block(shape.width, min(32, most), width=max(shape.width, shape.mlp_width), out=True),
        MEMORY=block(4 * shape.width, most),
        MLP=block(shape.mlp_width, most // 2, pair=True),
        DECODE=block(shape.vocab_size, most),
        CU=unit,
        BD=triton.next_power_of_2(shape.width),
        BV=min(512, triton.next_power_of_2(shape.vocab_size)),
        BP=triton.next_power_of_2(num_programs),
        BQ=triton.next_power_of_2(max(1, num_programs // groups)),
        LINES=0 if interpreted else lines,
    )


@dataclass(frozen=True)
class PacketTiles:
    """Constants of the launch for one lane.

    Arguments:
        R: rows of a portion. SHARE: threads of a row. WARPS: warps that share the rows.
        G: channels of a granule. GRANULES: of a portion. CH: channels of activations that are gathered together.
        SLOTS: portions that there is room for. TOGETHER: of a turn. PACE: clocks between two that are asked for, for
            each granule; 0 where they come from L2. NARROW: whether packets are of 4 bytes.
        TABLE: bytes of shared memory for a token's table.
        CU: value channels of a head that are one unit of memory. BD, BV, BP: D, ids and programs at once, padded.
        BRACE: ids a program races at once. P: programs.
    """

    R: int
    SHARE: int
    WARPS: int
    G: int
    GRANULES: int
    CH: int
    SLOTS: int
    PACE: int
    NARROW: bool
    TOGETHER: int
    TABLE: int
    CU: int
    BD: int
    BV: int
    BP: int
    BRACE: int
    P: int

    @property
    def num_warps(self) -> int:
        return self.WARPS

    @property
    def ring_bytes(self) -> int:
        """Of shared memory, besides what the compiler takes."""
        return ring_bytes(self.GRANULES, self.SLOTS, self.WARPS) + self.TABLE

    def turns(self, shape: BrainShape) -> TurnTable:
        """What `turn_table` makes for these tiles."""
        return turn_table(shape, self.P, self.R, self.WARPS, self.G, self.GRANULES, self.CU, self.TOGETHER)

    def constexprs(self) -> dict[str, int]:
        """Keyword arguments of the kernel."""
        return {name: value for name, value in asdict(self).items() if name not in ("TOGETHER", "NARROW")}


_MOST_GRANULES = 6  # of a turn: 48 KB of weights a program
_MOST_VALUES = 48  # of a thread's activations, which stay in its registers for a phase
_MOST_SLOTS = 16
_CLOCKS_OF_GRANULE = 384  # 8 KB of a program's: at 1.98 GHz 132 of them ask for at most 5.6 TB/s
_CACHE_BYTES = 48 * 2**20  # of L2: weights that fit come from there, and nothing queues
_PORTIONS_OF_TURN = 3  # all channels of a SwiGLU at base's width
_TABLE_STEP = 2048  # another size of the table is another kernel
_SHARED_BYTES = 218 * 1024  # for weights in flight and activations; the rest is the compiler's
MAX_ROOM_BYTES = 48 * 1024
MAX_PACKET_LANES = 1


def packet_room(shape: BrainShape, turn: int) -> int:
    """Bytes of shared memory for the activations of one phase, in turns of so many channels; more than MAX_ROOM_BYTES
    is not to be had."""
    part = min(shape.column_width, shape.head_width, 64)
    return room_bytes(shape.width, shape.mlp_width, turn, part)


def choose_packets(shape: BrainShape, dtype: torch.dtype, num_programs: int) -> PacketTiles:
    """Tiles for one lane: if it goes, a turn takes all channels of width D, in the fewest and least padded granules."""
    return _choose_packets(shape, dtype, num_programs, _INTERPRETED_TILE)


@functools.lru_cache(maxsize=64)
def _choose_packets(shape: BrainShape, dtype: torch.dtype, num_programs: int, interpreted_tile: int) -> PacketTiles:
    group = max(shape.column_width, shape.head_width)
    is_large = shape.bytes_per_token(element_size=dtype.itemsize) > _CACHE_BYTES
    if num_programs == 1:
        rows, num_warps, share, slots, at_once = interpreted_tile, 1, 1, 1, 2
        sizes = [interpreted_tile >> i for i in range(10) if interpreted_tile >> i >= max(group, 16)]
        channels = min(sizes or [group], key=lambda size: (triton.cdiv(shape.width, size) * size, -size))
        granules, unit, gathered, table = min(triton.cdiv(shape.width, channels), 4), shape.head_width, channels, 0
    else:
        num_warps = _NUM_WARPS
        rows, share = num_warps * ROWS_OF_WARP, 32 // ROWS_OF_WARP
        channels = GRANULE_BYTES // dtype.itemsize
        together = max(1, group // channels)  # granules that hold whole columns and heads
        most = min(_MOST_GRANULES, _MOST_VALUES * dtype.itemsize // 16) // together * together
        width = triton.cdiv(shape.width, channels)
        granules = triton.cdiv(triton.cdiv(width, triton.cdiv(width, most)), together) * together
        turn = granules * channels
        gathered = min(512, turn & -turn)
        unit = 16
        while unit > 4 and shape.width < 96 * unit:
            unit //= 2
        unit = min(unit, shape.head_width)
        at_once = _PORTIONS_OF_TURN
        table_of = turn_table(shape, num_programs, rows, num_warps, channels, granules, unit, at_once)
        table = triton.cdiv((table_of.portions.shape[1] + table_of.turns.shape[1]) * 8, _TABLE_STEP) * _TABLE_STEP
        fixed = ring_bytes(granules, 0, num_warps)
        left = _SHARED_BYTES - packet_room(shape, turn) - table - fixed
        slots = max(at_once, min(_MOST_SLOTS, left // (ring_bytes(granules, 1, num_warps) - fixed)))
    return PacketTiles(
        R=rows,
        SHARE=share,
        WARPS=num_warps,
        G=channels,
        GRANULES=granules,
        CH=gathered,
        SLOTS=slots,
        PACE=_CLOCKS_OF_GRANULE if is_large else 0,
        NARROW=dtype.itemsize == 1 or (dtype.itemsize == 2 and not is_large),
        TOGETHER=at_once,
        TABLE=table,
        CU=unit,
        BD=triton.next_power_of_2(shape.width),
        BV=min(1024, triton.next_power_of_2(shape.vocab_size)),
        BP=triton.next_power_of_2(num_programs),
        BRACE=min(512, triton.next_power_of_2(triton.cdiv(triton.cdiv(shape.vocab_size, rows), num_programs) * rows)),
        P=num_programs,
    )
