"""The order in which the launch for one lane reads weights: every one once a token, by the warp whose row it is of."""

import pytest
import torch

from kernels.generate.layout import BrainShape
from kernels.generate.matrix_order import CORTEX_IN, DECODE, MEMORY_IN, MLP_IN, MLP_OUT, OUT, matrices_in_order
from kernels.generate.turns import in_pieces, turn_table


@pytest.mark.parametrize(
    ("num_programs", "rows", "num_warps", "channels", "granules", "most"),
    [(5, 16, 8, 32, 1, 1), (132, 16, 8, 16, 2, 3), (1, 512, 1, 64, 2, 2), (3, 16, 4, 16, 6, 3), (7, 16, 8, 16, 3, 2)],
)
def test_every_weight_is_read_once_by_the_warp_that_has_its_row(
    num_programs: int, rows: int, num_warps: int, channels: int, granules: int, most: int
) -> None:
    shape = BrainShape(48, 16, 16, 112, 263, 1, 2, 1)
    matrices, decoder = torch.randn(shape.matrices_size), torch.randn(shape.vocab_size, shape.width)
    pieces = in_pieces(shape, matrices, decoder, rows, num_warps, channels)
    table = turn_table(shape, num_programs, rows, num_warps, channels, granules, 4, most)
    halves = {(layer, kind): value for kind, layer, *value in matrices_in_order(shape)}
    read = {key: torch.zeros(n[3], n[1], n[2]) for key, n in halves.items()}
    of_warp = rows // num_warps
    for program, (num_portions, num_turns) in enumerate(table.counts.tolist()):
        portions = iter(table.portions[program, :num_portions].tolist())
        for use in table.turns[program, :num_turns].tolist():
            start, layer, chunk, kind, half = (
                use >> 36 & 0xFFFFFF,
                use >> 24 & 4095,
                use >> 8 & 63,
                use >> 4 & 7,
                use >> 3 & 1,
            )
            offset, num_rows, width_in, num_halves = halves[layer, kind]
            flat = decoder.flatten() if kind == DECODE.value else matrices
            both = flat[offset : offset + num_halves * num_rows * width_in].view(num_halves, num_rows, width_in)
            assert use >> 60 & 7 <= most
            for i in range(use >> 60 & 7):
                first, stride, count = (fetch := next(portions)) & 0xFFFFFFFF, fetch >> 32 & 0xFFFF, fetch >> 48
                at, of, begin = half, start, chunk * granules * channels
                if use & 128:
                    begin += i * granules * channels
                elif num_halves == 2:
                    at += i
                else:
                    of += i * rows * num_programs
                left = min(rows, num_rows - of)
                assert i > 0 or use >> 14 & 1023 == left
                for row in range(left):
                    piece = first + row // of_warp * stride
                    ours = pieces[piece : piece + count, row % of_warp].flatten()
                    expected = both[at, of + row, begin : begin + count * channels]
                    assert torch.equal(ours[: len(expected)], expected)
                    assert not ours[len(expected) :].any()
                    read[layer, kind][at, of + row, begin : begin + count * channels] += 1
        assert next(portions, None) is None
    assert all(bool((count == 1).all()) for count in read.values())


BASE = BrainShape(1536, 128, 128, 4096, 50257, 1, 4, 1)
SMALL = BrainShape(512, 64, 64, 1344, 257, 1, 4, 1)


@pytest.mark.parametrize(("shape", "granules", "unit", "most"), [(BASE, 6, 16, 1.02), (SMALL, 2, 4, 1.1)])
def test_programs_read_equally_much(shape: BrainShape, granules: int, unit: int, most: float) -> None:
    pieces = (turn_table(shape, 132, 16, 8, 256, granules, unit, 3).portions >> 48).sum(1).double()
    assert float(pieces.max() / pieces.mean()) < most


@pytest.mark.parametrize("shape", [BASE, SMALL, BrainShape(48, 16, 16, 24, 263, 2, 1, 2)])
@pytest.mark.parametrize("num_programs", [1, 3, 132])
@pytest.mark.parametrize("most", [1, 3])
def test_who_takes_part_in_a_phase_has_what_it_needs(shape: BrainShape, num_programs: int, most: int) -> None:
    unit = 4
    table = turn_table(shape, num_programs, 16, 8, 256, 6, unit, most)
    order = [(layer, kind) for kind, layer, *_ in matrices_in_order(shape)]
    for program in range(num_programs):
        turns = table.turns[program, : int(table.counts[program, 1])].tolist()
        phases = [(use >> 24 & 4095, use >> 4 & 7) for use in turns]
        assert [order.index(phase) for phase in phases] == sorted(order.index(phase) for phase in phases)
        received, rows = set(), {}
        for i, (use, phase) in enumerate(zip(turns, phases)):
            assert bool(use & 4) == (i + 1 == len(turns) or phases[i + 1] != phase)  # the last one ends it
            received |= {phase} if use & 1 else set()
            if use >> 60 & 7:
                rows.setdefault(phase, set()).add(use >> 36 & 0xFFFFFF)
                assert phase in received
        assert phases[-1] == order[-1]
        for layer, kind in rows:
            if kind == MLP_OUT.value:
                assert (layer, MLP_IN.value) in received  # and so has what it adds to
            elif kind == OUT.value and (layer, CORTEX_IN.value) in order:
                assert rows[layer, kind] == rows[layer, CORTEX_IN.value]  # the state's new spikes are its own
            elif kind == OUT.value:
                assert (layer, MEMORY_IN.value) in received
        for layer, kind in order:
            if kind == MEMORY_IN.value and program < shape.width // unit:
                assert (layer, kind) in received
            if kind == CORTEX_IN.value and layer == shape.num_wernicke + shape.num_memory:
                assert (layer, kind) in received or program < num_programs - shape.num_columns


def test_a_turn_has_what_a_program_can_multiply_at_once() -> None:
    table = turn_table(BASE, 132, 16, 8, 256, 6, 16, 3)
    num = {kind: set() for kind in range(6)}
    for use in table.turns.flatten().tolist():
        num[use >> 4 & 7].add(use >> 60 & 7)
    assert num[CORTEX_IN.value] == num[MLP_IN.value] | {0} == {0, 2}  # both matrices of a pair; some have a gate alone
    assert num[MEMORY_IN.value] == num[DECODE.value] == {1, 2}  # blocks of rows
    assert num[OUT.value] == {1}
    assert num[MLP_OUT.value] == {3}  # all channels
