"""Tile sizes of the launch, by lanes, type and programs; what a GPU session tunes."""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
import triton

from kernels.generate.activations import room_bytes
from kernels.generate.layout import BrainShape


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
    """Constants of the launch for many lanes.

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


def _block(rows: int, pair: bool, lanes: int, width: int, group: int, itemsize: int, ring_bytes: int) -> Block:
    """The tile for at most `rows` rows of a program, whose slices must lie in a group of channels."""
    all_rows = 2 * rows if pair else rows
    padded = triton.next_power_of_2(width)
    if itemsize == 4:
        slices, channels, most = 1, min(64, group, padded), 2
    elif all_rows < _WARPGROUP_ROWS and lanes < _WARPGROUP_ROWS:
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
    unit = min(shape.head_width, 128 if padded_lanes == 64 else 64)
    while unit > 16 and num_lanes * shape.width < num_programs * unit:
        unit //= 2
    return Tiles(
        BL=padded_lanes,
        GROUPS=groups,
        PAIR=block(shape.width, min(16, shape.column_width), pair=True),
        OUT=block(shape.width, min(32, most), width=max(shape.width, shape.mlp_width), out=True),
        MEMORY=block(4 * shape.width, most),
        MLP=block(shape.mlp_width, most // 2, pair=True),
        DECODE=block(shape.vocab_size, 2 * most),
        CU=unit,
        BD=triton.next_power_of_2(shape.width),
        BV=min(2048, triton.next_power_of_2(shape.vocab_size)),
        BP=triton.next_power_of_2(num_programs),
        BQ=triton.next_power_of_2(max(1, num_programs // groups)),
        LINES=0 if interpreted else lines,
    )


@dataclass(frozen=True)
class StreamTiles:
    """Constants of the launch for few lanes.

    Arguments:
        BL: columns of activations. LN: lanes, padded. SPLIT: two columns a lane.
        R, NB, KS: rows, slices and channels of a slice of a tile. STAGES: tiles in flight, and one.
        CU: value channels of a head that are one unit of memory. BD, BV, BP: D, ids and programs at once, padded.
        BRACE: ids a program races at once. P: programs. TOKENS: tokens that weights are asked for without a pause.
    """

    BL: int
    LN: int
    SPLIT: bool
    R: int
    NB: int
    KS: int
    CU: int
    BD: int
    BV: int
    BP: int
    BRACE: int
    P: int
    STAGES: int
    TOKENS: int = 16
    num_warps: int = 8

    def constexprs(self) -> dict[str, int | bool]:
        """Keyword arguments of the kernel."""
        constants = asdict(self)
        del constants["num_warps"]
        return constants


MAX_STREAM_LANES = 4
MAX_PACKET_LANES = 1
_RING_BYTES = 192 * 1024  # of shared memory, for tiles in flight


def choose_stream(
    shape: BrainShape, num_lanes: int, dtype: torch.dtype, num_programs: int, *, channels: int = 512, rows: int = 16
) -> StreamTiles:
    """Tiles for at most MAX_STREAM_LANES lanes."""
    group = max(shape.column_width, shape.head_width)
    if num_programs == 1:
        channels, rows = _INTERPRETED_TILE, _INTERPRETED_TILE
        unit = shape.head_width
    else:
        unit = 16
        while unit > 4 and num_lanes * shape.width < 96 * unit:
            unit //= 2
    channels = max(group, min(channels, triton.next_power_of_2(shape.width)))
    slice_channels = min(64, shape.column_width, shape.head_width)
    # Columns: every lane's chunks of channels, twice where values are rounded and that is not too many.
    lanes = triton.next_power_of_2(num_lanes)
    while triton.cdiv(max(shape.width, shape.mlp_width), channels) > 8:
        channels *= 2
    chunks = triton.next_power_of_2(triton.cdiv(max(shape.width, shape.mlp_width), channels))
    split = (dtype.itemsize == 2 or num_programs == 1) and 2 * lanes * chunks <= 32
    tile_bytes = rows * channels * dtype.itemsize
    return StreamTiles(
        BL=max(8, lanes * chunks * (2 if split else 1)),
        LN=lanes,
        SPLIT=split,
        R=rows,
        NB=channels // slice_channels,
        KS=slice_channels,
        CU=min(unit, shape.head_width),
        BD=triton.next_power_of_2(shape.width),
        BV=min(2048, triton.next_power_of_2(shape.vocab_size)),
        BP=triton.next_power_of_2(num_programs),
        BRACE=min(512, triton.next_power_of_2(triton.cdiv(triton.cdiv(shape.vocab_size, rows), num_programs) * rows)),
        P=num_programs,
        STAGES=min(16, _RING_BYTES // tile_bytes + 1),
    )


@dataclass(frozen=True)
class PacketTiles:
    """Constants of the launch for one lane.

    Arguments:
        R: rows of a tile. NH, NI, KS: its channels, NH * NI slices of KS. U: tiles of a turn, one behind another.
        CU: value channels of a head that are one unit of memory.
        BD, BV, BP: D, ids and programs at once, padded. BRACE: ids a program races at once. P: programs.
        STAGES: turns in flight, and one. TOKENS: tokens that weights are asked for without a pause.
    """

    R: int
    NH: int
    NI: int
    KS: int
    U: int
    CU: int
    BD: int
    BV: int
    BP: int
    BRACE: int
    P: int
    STAGES: int
    TOKENS: int = 16
    num_warps: int = 8

    @property
    def channels(self) -> int:
        return self.NH * self.NI * self.KS

    def constexprs(self) -> dict[str, int]:
        """Keyword arguments of the kernel."""
        constants = asdict(self)
        del constants["num_warps"]
        return constants


_MOST_TOGETHER = 4  # tiles of a turn
_TURN_BYTES = 64 * 1024  # at most
_MOST_BYTE_TILES = 18  # in flight: the loop's beginning asks for them one by one, and more take its registers
_SHARED_BYTES = 218 * 1024  # for tiles in flight and activations
MAX_ROOM_BYTES = 48 * 1024


def packet_room(shape: BrainShape, channels: int, together: int) -> int:
    """Bytes of shared memory for the activations of one phase; more than MAX_ROOM_BYTES is not to be had."""
    part = min(shape.column_width, shape.head_width, 64)
    return room_bytes(shape.width, shape.mlp_width, channels, together, part)


def choose_packets(
    shape: BrainShape,
    dtype: torch.dtype,
    num_programs: int,
    *,
    rows: int | None = None,
    channels: int | None = None,
    together: int | None = None,
    ring_bytes: int = _RING_BYTES,
    num_warps: int = 8,
) -> PacketTiles:
    """Tiles for one lane: if it goes, a turn takes all channels of width D, in the fewest and least padded tiles."""
    group = max(shape.column_width, shape.head_width, 32 // dtype.itemsize)  # a slice has 32 bytes at least
    rows, largest = (_INTERPRETED_TILE, _INTERPRETED_TILE) if num_programs == 1 else (rows or 16, 512)
    most_bytes = 2**30 if num_programs == 1 else _TURN_BYTES
    if channels is None:
        sizes = [largest >> i for i in range(10) if largest >> i >= group] or [group]

        def cost(size: int) -> tuple[int, int, int]:
            turn = size * min(triton.cdiv(shape.width, size), _MOST_TOGETHER)
            fits = turn * rows * dtype.itemsize <= most_bytes
            return (0 if fits else 1, triton.cdiv(shape.width, size) * size, -size)

        channels = min(sizes, key=cost)
    if together is None:
        together = min(triton.cdiv(shape.width, channels), _MOST_TOGETHER)
        while together > 1 and together * channels * rows * dtype.itemsize > most_bytes:
            together -= 1
    room = packet_room(shape, channels, together)
    ring_bytes = min(ring_bytes, _SHARED_BYTES - room)
    unit = shape.head_width
    if num_programs > 1:
        unit = 16
        while unit > 4 and shape.width < 96 * unit:
            unit //= 2
    slice_channels = min(128 // dtype.itemsize, channels)
    inner = min(4, channels // slice_channels)
    num_turns = min(15, ring_bytes // (together * rows * channels * dtype.itemsize))
    if dtype.itemsize == 1:
        num_turns = min(num_turns, _MOST_BYTE_TILES // together)
    return PacketTiles(
        R=rows,
        NH=channels // slice_channels // inner,
        NI=inner,
        KS=slice_channels,
        U=together,
        CU=min(unit, shape.head_width),
        BD=triton.next_power_of_2(shape.width),
        BV=min(2048, triton.next_power_of_2(shape.vocab_size)),
        BP=triton.next_power_of_2(num_programs),
        BRACE=min(512, triton.next_power_of_2(triton.cdiv(triton.cdiv(shape.vocab_size, rows), num_programs) * rows)),
        P=num_programs,
        STAGES=max(1, num_turns) + 1,
        num_warps=num_warps,
    )
