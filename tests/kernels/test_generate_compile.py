"""The generating launch as compiled for a GPU that need not be there: no spills, wide loads, enough room."""

import re
from collections import Counter

import pytest
import torch
from compiler import call_in_compiler

from kernels.generate.kernel import generate_kernel
from kernels.generate.layout import BrainShape
from kernels.generate.packet_kernel import packet_kernel
from kernels.generate.tiles import PacketTiles, choose_packets, choose_tiles, packet_room
from kernels.offline import SHARED_LIMITS, compile_kernel

SIZES = {
    "base": BrainShape(1536, 128, 128, 4096, 50257, 1, 4, 1),
    "small": BrainShape(512, 64, 64, 1344, 257, 1, 4, 1),
    "nano": BrainShape(128, 64, 64, 320, 257, 1, 2, 1),
    "two widths": BrainShape(64, 32, 16, 192, 67, 1, 2, 2),  # of columns and heads, which the interpreter lets pass
}
KERNELS = {"packet": packet_kernel, "generate": generate_kernel}


def check_launch(name: str, size: str, lanes: int, dtype: str, capability: int, stack: int = 0) -> None:
    stack_bytes, shared_bytes, code = call_in_compiler(
        "test_generate_compile", "compile_launch", name, size, lanes, dtype, capability
    )
    assert stack_bytes <= stack
    assert shared_bytes <= SHARED_LIMITS[capability]
    if name == "generate":
        copies = set(re.findall(r"\bLDGSTS[\w.]*", code))
        assert copies <= {"LDGSTS.E.BYPASS.128"}, "what other programs wrote is read from the first-level cache"
        assert "CCTL.E.PF2" in code, "nothing is prefetched"
        if dtype == "bfloat16":
            check_products(code, capability)
    else:
        tiles = choose_packets(SIZES[size], getattr(torch, dtype), 132)
        assert "UBLKCP" in code, "weights are not copied in bulk"
        assert code.count("MEMBAR.ALL.GPU") == 1, "one barrier a token, before the draw"
        check_turn(tiles, getattr(torch, dtype), code)


def check_turn(tiles: PacketTiles, dtype: torch.dtype, code: str) -> None:
    """A turn takes each of a thread's weights by one multiply-add and at most one instruction before it, and no warp
    waits for another."""
    weights = tiles.GRANULES * 16 // dtype.itemsize * tiles.R // tiles.WARPS
    blocks = [re.findall(r"\*/\s+(?:@!?U?P\w+ )?(\w[\w.]*) ", block) for block in re.split(r"\.L_x_\d+:|\bBRA ", code)]
    multiplying = [Counter(block) for block in blocks if block.count("FFMA") >= weights]
    assert len(multiplying) >= 4, "a portion, two, and one of several of different channels"
    assert not any(turn["LDL"] or turn["STL"] for turn in multiplying)
    turn = Counter(max(blocks, key=lambda block: block.count("LDS.128") + block.count("FFMA")))
    opening = sum(turn[op] for op in ("PRMT", "LOP3.LUT", "SHF.L.U32", "IMAD.U32", "IMAD.SHL.U32"))
    assert weights <= turn["FFMA"] + turn["FMUL"] <= weights + 16, (
        "FFMA.FTZ would take a byte, a subnormal number, for zero"
    )
    assert turn["LDS.128"] == tiles.GRANULES * tiles.R // tiles.WARPS
    assert opening <= (weights if dtype != torch.float32 else 0) + 24
    assert not [op for op in turn if op.startswith(("I2F", "BAR.SYNC", "MEMBAR"))]


def check_products(code: str, capability: int) -> None:
    """Tensor cores multiply, and a turn of a loop over channels does little else: no conversion, nothing put aside."""
    parts = re.split(r"\.L_x_\d+:|\bBRA ", code)
    blocks = [Counter(re.findall(r"\*/\s+(?:@!?U?P\w+ )?(\w+)", part)) for part in parts]
    turns = [block for block in blocks if (block["HMMA"] or block["HGMMA"]) and block["LDGSTS"]]
    assert len(turns) >= 5, "of the five kinds of phases"
    for turn in turns:
        assert turn["FFMA"] <= turn["HMMA"] * 4 + 16, "norms of slices at most, and no products"
        assert turn["F2FP"] <= 16
        assert turn["STL"] <= 2
    if capability == 90:
        assert sum(block["HGMMA"] for block in blocks) >= 24, "64 rows or lanes are a warpgroup's product"


def compile_launch(name: str, size: str, lanes: int, dtype_name: str, capability: int) -> tuple[int, int, str]:
    """Bytes of stack and of shared memory, and the machine code."""
    kernel, shape, dtype = KERNELS[name], SIZES[size], getattr(torch, dtype_name)
    if name == "packet":
        tiles = choose_packets(shape, dtype, 132)
    else:
        tiles = choose_tiles(shape, lanes, dtype, 132, shared_bytes=SHARED_LIMITS[capability])
    flags = dict.fromkeys(("DELTA", "GREEDY", "PENALTY", "TOP_K", "TOP_P", "MIN_P", "SINGLE"), False)
    constants = dict(
        D=shape.width, C=shape.column_width, N=shape.head_width, M=shape.mlp_width, V=shape.vocab_size, TAPS=4,
        GRADED=True, GO=True, THETA=0.5, BETA=0.5, RHO=0.95, EPS=1e-6, BS=1, **flags, **tiles.constexprs(),
    )  # fmt: skip
    if name == "packet":
        constants["INT8"] = dtype == torch.uint8
    weight = "fp32" if dtype == torch.float32 else "bf16"
    tile = "u8" if dtype == torch.uint8 else weight
    types = dict.fromkeys(("p_ids", "p_stop", "p_lanes", "p_positions", "p_table"), "*i64")
    types |= dict.fromkeys(("p_embedding", "p_decoder", "p_matrices"), "*" + weight)
    types |= dict.fromkeys(("p_x_columns", "p_columns", "p_hidden"), "*" + weight)
    types |= {
        "p_packets": "*i32" if isinstance(tiles, PacketTiles) and tiles.NARROW else "*i64",
        "p_lengths": "*i32",
        "p_counter": "*i32",
        "p_counts": "*i32",
        "p_candidate_id": "*i32",
        "p_seen": "*i8",
        "p_pieces": "*" + tile,
    }
    types |= dict.fromkeys(("temperature", "penalty", "top_p", "log_min_p"), "fp32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32" if name[:2] == "p_" else "i32") for name in kernel.arg_names}
    used, code = compile_kernel(kernel, signature, constants, capability=capability, num_warps=tiles.num_warps)
    reserved = tiles.ring_bytes + packet_room(shape, tiles.G * tiles.GRANULES) if isinstance(tiles, PacketTiles) else 0
    return used.stack_bytes, used.shared_bytes + reserved, code


@pytest.mark.parametrize("dtype", ["bfloat16", "uint8"])
def test_the_launch_compiles_for_an_h200(dtype: str) -> None:
    check_launch("packet", "small", 1, dtype, 90)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "nano", "two widths"])
def test_int8_weights_compile_without_a_word_put_aside(size: str) -> None:
    check_launch("packet", size, 1, "uint8", 90)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "lanes", "dtype", "capability"),
    [
        ("packet", "base", 1, "bfloat16", 90),
        ("packet", "nano", 1, "bfloat16", 90),
        ("packet", "two widths", 1, "float32", 90),
        ("generate", "base", 1, "bfloat16", 89),
        ("generate", "base", 2, "bfloat16", 90),
        ("generate", "base", 16, "bfloat16", 90),
        ("generate", "base", 16, "bfloat16", 89),
        ("generate", "base", 64, "bfloat16", 90),
        ("generate", "small", 16, "float32", 90),
        ("generate", "two widths", 5, "float32", 90),
    ],
)
def test_other_sizes_compile(name: str, size: str, lanes: int, dtype: str, capability: int) -> None:
    # Numbers that live through a whole token may be put aside, some 70 words, with one lane 20; a spilled tile would be
    # among the turns, which `check_products` and `check_turn` look at.
    check_launch(name, size, lanes, dtype, capability, stack=96 if name == "packet" else 320)
