"""The order in which the launch for one lane reads weights: every one once a token, by the warp whose row it is of."""

import pytest
import torch

from kernels.generate.layout import BrainShape
from kernels.generate.matrix_order import DECODE, matrices_in_order
from kernels.generate.turns import count_turns, in_pieces, turn_table


@pytest.mark.parametrize(
    ("num_programs", "rows", "num_warps", "channels", "granules"),
    [(5, 16, 8, 32, 1), (132, 16, 8, 16, 2), (1, 512, 1, 64, 2), (3, 16, 4, 16, 6)],
)
def test_every_weight_is_read_once_by_the_warp_that_has_its_row(
    num_programs: int, rows: int, num_warps: int, channels: int, granules: int
) -> None:
    shape = BrainShape(48, 16, 16, 112, 263, 1, 2, 1)
    matrices, decoder = torch.randn(shape.matrices_size), torch.randn(shape.vocab_size, shape.width)
    pieces = in_pieces(shape, matrices, decoder, rows, num_warps, channels)
    table = turn_table(shape, num_programs, rows, num_warps, channels, granules, torch.device("cpu"))
    assert table.shape[1] == count_turns(shape, num_programs, rows, channels, granules)
    halves = {(layer, kind): value for kind, layer, *value in matrices_in_order(shape)}
    read = {key: torch.zeros(n[3], n[1], n[2]) for key, n in halves.items()}
    for fetch, use in table.flatten(0, 1).tolist():
        start, layer, chunk, kind, half = use >> 36, (use >> 24) & 4095, (use >> 8) & 63, (use >> 4) & 7, (use >> 3) & 1
        left, first, stride, count = (use >> 14) & 1023, fetch & 0xFFFFFFFF, (fetch >> 32) & 0xFFFF, fetch >> 48
        assert (left > 0) == (count > 0)
        offset, num_rows, width_in, _ = halves[layer, kind]
        flat = decoder.flatten() if kind == DECODE.value else matrices
        matrix = flat[offset + half * num_rows * width_in :][: num_rows * width_in].view(num_rows, width_in)
        begin = chunk * granules * channels
        of_warp = rows // num_warps
        for row in range(left):
            at = first + row // of_warp * stride
            ours = pieces[at : at + count, row % of_warp].flatten()
            expected = matrix[start + row, begin : begin + count * channels]
            assert torch.equal(ours[: len(expected)], expected)
            assert not ours[len(expected) :].any()
            read[layer, kind][half, start + row, begin : begin + count * channels] += 1
    assert all(bool((count == 1).all()) for count in read.values())
