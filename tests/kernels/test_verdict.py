"""The gradients' norm and the verdict on a step: launches against torch, and what the compiler makes of them."""

import math

import numpy as np
import pytest
import torch
from fused_checks import CompileCase, amid_nan, check_compiled

from kernels.launch import INTERPRETED
from kernels.verdict import NUM_REMEMBERED, History, fused, verdict_reference

DEVICE = "cpu" if INTERPRETED else "cuda"


def new_history():
    return History(
        torch.zeros(2, NUM_REMEMBERED, dtype=torch.float64, device=DEVICE),
        torch.zeros((), dtype=torch.int64, device=DEVICE),
        torch.zeros((), dtype=torch.int64, device=DEVICE),
    )


def test_norm(monkeypatch):
    monkeypatch.setattr(fused, "_BLOCK", 16)
    monkeypatch.setattr(fused, "_PART", 64)
    grads = [torch.randn(shape, device=DEVICE) for shape in ((3, 8), (67,), (64, 5), (1,))]
    table = fused.make_norm_table(grads)
    for scale in (1.0, 3.0):
        scaled = [scale * grad for grad in grads]
        expected = torch.cat([grad.double().flatten() for grad in scaled]).norm()
        assert float(fused.gradient_norm_fused(table, scaled)) == pytest.approx(float(expected), rel=1e-6)
    grads[1][5] = math.inf
    assert float(fused.gradient_norm_fused(table, grads)) == math.inf
    grads[1][5] = math.nan
    assert math.isnan(float(fused.gradient_norm_fused(table, grads)))
    with pytest.raises(ValueError, match="contiguous float32"):
        fused.gradient_norm_fused(table, [*grads[:2], grads[2].t(), grads[3]])


def test_norm_of_both_precisions_together():
    grads = [torch.randn(size, device=DEVICE) for size in (8, 67, 320, 1, 4096, 40000)]
    grads[1::2] = [grad.half() for grad in grads[1::2]]
    expected = torch.cat([grad.double() for grad in grads]).norm()
    got = fused.gradient_norm_fused(fused.make_norm_table(grads), grads)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norm_reads_nothing_beside_the_gradients(dtype):
    grads = [amid_nan(torch.randn(size, device=DEVICE).to(dtype)) for size in (1, 2, 3, 5, 12, 4095, 4097)]
    expected = torch.cat([grad.double() for grad in grads]).norm()
    got = fused.gradient_norm_fused(fused.make_norm_table(grads), grads)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("sigma", [None, 3.0])
def test_verdicts_are_those_of_the_definition(sigma):
    random = np.random.default_rng(0)
    own, expected = new_history(), new_history()
    skipped = []
    for step in range(NUM_REMEMBERED + 60):
        loss, norm = 2.0 + 0.1 * random.standard_normal(), 1.0 + 0.5 * abs(random.standard_normal())
        loss = {11: math.nan, 150: -math.inf}.get(step, loss)
        norm *= {7: 20.0, 140: 20.0, 160: math.inf}.get(step, 1.0)
        values = [torch.tensor(value, device=DEVICE) for value in (loss, norm)]
        got = fused.verdict_fused(*values, own, sigma=sigma, max_norm=1.5)
        wanted = verdict_reference(*values, expected, sigma=sigma, max_norm=1.5)
        skipped.append(float(got[0]))
        assert skipped[-1] == float(wanted[0]), step
        torch.testing.assert_close(got[1], wanted[1])
        for mine, theirs in zip(own, expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert sum(skipped) == (3 if sigma is None else 4)


def test_compiles_without_spills():
    sums = {"table_ptr": "*i64", "block_ptr": "*i32", "sum_ptr": "*fp32"}
    root = {"sum_ptr": "*fp32", "norm_ptr": "*fp32", "num_sums": "i32"}
    verdict = {
        "loss_ptr": "*fp32",
        "norm_ptr": "*fp32",
        "value_ptr": "*fp64",
        "count_ptr": "*i64",
        "streak_ptr": "*i64",
        "skipped_ptr": "*fp32",
        "factor_ptr": "*fp32",
    }
    constants = {"MAX_NORM": 1.0, "EPS": 1e-6, "LEAST_FACTOR": 2.0, "NUM": NUM_REMEMBERED}
    of = "kernels.verdict.fused"
    check_compiled(
        [
            CompileCase(of, "root_kernel", root, {"BLOCK": 2048}, 8),
            CompileCase(of, "verdict_kernel", verdict, {**constants, "SIGMA": 5.0}, 1),
            CompileCase(of, "verdict_kernel", verdict, {**constants, "SIGMA": -1.0}, 1),
        ]
    )
    parts = {"BLOCK": 2048, "PART": 32768, "HALF": "tl.bfloat16"}
    first, _ = check_compiled([CompileCase(of, "square_sums_kernel", sums, parts, 4)], read_code=True)
    # Four numbers at a time, and one at a time where the last four are not all there.
    assert "LDGSTS.E.BYPASS.128" in first.machine_code
    assert "LDGSTS.E [" in first.machine_code
