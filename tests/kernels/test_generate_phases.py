"""Phases of the launch for several lanes, each alone: several programs, groups of them, and each way to multiply.

Between barriers programs do not depend on each other, so the interpreter, which runs them in turn, can do a phase.
"""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import pytest
import torch
import triton
import triton.language as tl

from kernels.generate.device import share, this_program
from kernels.generate.layout import BrainShape
from kernels.generate.phases import add_rows, cortex_in, go_gates, lateral_input, memory_in, swiglu_in
from kernels.generate.tiles import Block, choose_tiles
from kernels.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
EPS = 1e-6
PROGRAMS = 5
BLOCKS = {"slices": Block(16, 4, 16, 2), "one slice": Block(32, 1, 16, 2), "64 rows": Block(64, 1, 16, 2)}


@triton.jit
def add_kernel(
    p_in, p_share, p_go, p_spikes, p_state, p_x, p_x_columns, p_square, p_matrix, num_lanes,
    D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, GO: tl.constexpr,
    EPS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
    BR: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    add_rows(
        this_program(True), p_in, p_share, p_go, True, p_spikes, p_state, p_x, p_x_columns, p_square, p_matrix,
        num_lanes, D, K, C, GROUP, SHARE, GO, True, EPS, GROUPS, LANES, BR, NB, KS, STAGES,
    )  # fmt: skip


@triton.jit
def rows_kernel(
    p_x, p_square, p_inner, p_memory_matrix, p_hidden, p_mlp_matrix, num_lanes,
    D: tl.constexpr, M: tl.constexpr, EPS: tl.constexpr, GROUPS: tl.constexpr, BQ: tl.constexpr, BL: tl.constexpr,
    BR: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = this_program(True)
    memory_in(program, p_x, p_square, p_inner, p_memory_matrix, num_lanes, D, EPS, GROUPS, BQ, BL, BR, NB, KS, STAGES)
    swiglu_in(program, p_x, p_square, p_hidden, p_mlp_matrix, num_lanes, D, M, EPS, GROUPS, BQ, BL, BR, NB, KS, STAGES)


@triton.jit
def spikes_kernel(
    p_x, p_square, p_columns, p_share, p_spikes, p_state, p_matrix, p_vector, p_lengths, p_go, p_go_vector, num_lanes,
    D: tl.constexpr, C: tl.constexpr, GRADED: tl.constexpr, EPS: tl.constexpr, BQ: tl.constexpr, BL: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, NB: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = this_program(True)
    tile, _ = share(program, D, BR, 1)
    p_old = p_state + 2 * num_lanes * D
    lateral = lateral_input(program, p_old, p_vector, tile, D, num_lanes, D, C, BL, BR, True)
    cortex_in(
        program, lateral, p_x, p_square, p_columns, p_share, p_spikes, p_state, p_matrix, p_vector, p_lengths, 3,
        num_lanes, D, C, GRADED, 0.5, 0.4, 0.9, EPS, 1, BQ, BL, BR, NB, KS, STAGES, True,
    )  # fmt: skip
    go_gates(program, p_x, p_go, p_go_vector, num_lanes, D, D // C, EPS, BD)


def blocks(block: Block) -> dict[str, int]:
    return dict(zip(("BR", "NB", "KS", "STAGES"), block))


def randn(*size: int) -> torch.Tensor:
    return torch.randn(*size, device=DEVICE)


def filled(*size: int) -> torch.Tensor:
    return torch.full(size, float("nan"), device=DEVICE)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("block", list(BLOCKS))
@pytest.mark.parametrize(("lanes", "padded"), [(5, 16), (33, 64)])
def test_rows_are_added_by_groups_of_programs(lanes: int, padded: int, block: str, groups: int) -> None:
    torch.manual_seed(lanes)
    width, column, part = 80, 16, 8
    y, x, matrix = randn(lanes, width), randn(lanes, width), randn(width, width)
    spikes, state, go = randn(lanes, width), filled(lanes, width), randn(lanes, width // column)
    shares = torch.zeros(width // part, padded, device=DEVICE)
    shares[:, :lanes] = spikes.view(lanes, -1, part).square().sum(-1).T
    squares, columns, new = torch.zeros(PROGRAMS, padded, device=DEVICE), filled(lanes, width), x.clone()
    add_kernel[(PROGRAMS,)](
        y, shares, go, spikes, state, new, columns, squares, matrix, lanes,
        D=width, K=width, C=column, GROUP=column, SHARE=part, GO=True, EPS=EPS, GROUPS=groups, LANES=padded,
        **blocks(BLOCKS[block]),
    )  # fmt: skip
    scale = (spikes.view(lanes, -1, column).square().mean(-1) + EPS).rsqrt() * go
    expected = x + (y.view(lanes, -1, column) * scale[..., None]).view(lanes, width) @ matrix.T
    close(new, expected)
    assert torch.equal(columns, new)
    assert torch.equal(state, spikes)
    close(squares[: PROGRAMS // groups, :lanes].sum(0), expected.square().sum(-1))


@pytest.mark.parametrize("block", list(BLOCKS))
@pytest.mark.parametrize(("lanes", "padded"), [(7, 16), (64, 64)])
def test_rows_and_pairs_of_what_is_normalised_by_shares(lanes: int, padded: int, block: str) -> None:
    torch.manual_seed(lanes)
    width, hidden_width = 48, 112
    x, matrix, pairs = randn(lanes, width), randn(4 * width, width), randn(2 * hidden_width, width)
    squares = filled(PROGRAMS, padded)
    squares[0] = 0
    squares[0, :lanes] = x.square().sum(-1) / 3
    squares[1] = 2 * squares[0]
    inner, hidden = filled(lanes, 4 * width), filled(lanes, hidden_width)
    rows_kernel[(PROGRAMS,)](
        x, squares, inner, matrix, hidden, pairs, lanes,
        D=width, M=hidden_width, EPS=EPS, GROUPS=2, BQ=2, BL=padded, **blocks(BLOCKS[block]),
    )  # fmt: skip
    normed = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    close(inner, normed @ matrix.T)
    gate, value = (normed @ pairs.T).chunk(2, -1)
    close(hidden, torch.nn.functional.silu(gate) * value)


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("block", [Block(16, 4, 16, 2), Block(8, 1, 32, 2)])
@pytest.mark.parametrize(("lanes", "padded"), [(5, 16), (40, 64)])
def test_spikes_of_many_lanes(lanes: int, padded: int, block: Block, graded: bool) -> None:
    torch.manual_seed(lanes)
    width, column, num_columns = 96, 16, 6  # more tiles than programs
    x, matrix, state = randn(lanes, width), randn(2 * width, width) / 5, randn(3, lanes, width)
    lateral, alpha, bias = randn(num_columns, column, column), torch.rand(width, device=DEVICE), randn(width)
    go_weight, go_bias = randn(num_columns, width) / 5, randn(num_columns)
    lengths = torch.zeros(lanes, dtype=torch.int32, device=DEVICE)
    lengths[1] = 2  # ended before this step
    squares = torch.zeros(PROGRAMS, padded, device=DEVICE)
    squares[2, :lanes] = x.square().sum(-1)
    columns, spikes, go = filled(lanes, width), filled(lanes, width), filled(lanes, num_columns)
    shares, before = filled(width // block.rows, padded), state.clone()
    spikes_kernel[(PROGRAMS,)](
        x, squares, columns, shares, spikes, state, matrix, torch.cat([lateral.flatten(), alpha, bias]), lengths, go,
        torch.cat([go_weight.flatten(), go_bias]), lanes,
        D=width, C=column, GRADED=graded, EPS=EPS, BQ=8, BL=padded, BD=128, **blocks(block),
    )  # fmt: skip
    normed = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    drive, gate = (normed @ matrix.T).chunk(2, -1)
    old_v, old_a, old_s = before
    a = old_s + 0.9 * (old_a - old_s)
    inward = torch.einsum("kij,bkj->bki", lateral, old_s.view(lanes, num_columns, column)).reshape(lanes, width)
    v = alpha * (old_v - 0.5 * old_s) + (1 - alpha).sqrt() * (drive + bias) + (1 - alpha) * inward
    u = v - 0.4 * a - 0.5
    s = u.clamp(0, 4) if graded else (u > 0).float()
    expected = torch.stack([v, a, old_s])
    expected[:, 1], s[1] = before[:, 1], old_s[1]
    close(state, expected)
    close(spikes, s)
    close(columns, s * torch.nn.functional.silu(gate))
    close(shares[:, :lanes].T, s.view(lanes, -1, block.rows).square().sum(-1))
    close(go, torch.sigmoid(normed @ go_weight.T + go_bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lanes", [1, 2, 5, 16, 17, 33, 64])
@pytest.mark.parametrize("shared_kb", [99, 163, 227])
def test_tiles_fit_what_they_are_for(dtype: torch.dtype, lanes: int, shared_kb: int) -> None:
    for shape in (
        BrainShape(1536, 128, 128, 4096, 50257, 1, 4, 1),
        BrainShape(48, 16, 16, 112, 41, 1, 2, 1),
        BrainShape(8192, 256, 64, 21840, 50257, 1, 2, 1),
    ):
        tiles = choose_tiles(shape, lanes, dtype, 132, shared_bytes=shared_kb * 1024)
        for name in ("PAIR", "OUT", "MEMORY", "MLP", "DECODE"):
            block, of_group = getattr(tiles, name), name == "OUT"
            columns = tiles.BL // (tiles.GROUPS if of_group else 1)
            copied = columns * block.slices * block.channels * dtype.itemsize
            rows = block.rows * (2 if name in ("PAIR", "MLP") else 1)
            stage = (rows + columns) * block.slices * block.channels * dtype.itemsize
            assert block.stages == 1 or copied >= 16 * 32 * tiles.num_warps, "would be read from the first-level cache"
            assert stage * block.stages <= shared_kb * 1024
        assert max(tiles.OUT.channels, tiles.PAIR.rows) <= min(shape.column_width, 2 * shape.head_width)
        assert tiles.OUT.channels <= shape.head_width >= tiles.CU
