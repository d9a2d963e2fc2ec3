"""A state's tensors carried on in one launch."""

import math

import pytest
import torch
from fused_checks import CompileCase, amid_nan, check_compiled, is_amid_nan

from kernels.carry import carry_reference
from kernels.carry.fused import carry_fused, make_table
from kernels.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter refuses bfloat16 for its arithmetic, of which there is none here.
HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]


def make_states():
    whole = [torch.randint(-(2**40), 2**40, shape, device=DEVICE) for shape in ((3,), (3, 3))]
    single = [torch.randn(shape, device=DEVICE) for shape in ((3, 5), (2, 70, 70), (1,))]
    half = [torch.randn(3, 2, 31, device=DEVICE).to(dtype) for dtype in HALVES]
    return [*whole, *single, *half]


def test_what_was_is_kept_and_what_is_finite_goes_on():
    torch.manual_seed(0)
    own, new = make_states(), make_states()
    kept = [torch.zeros_like(x) for x in own]
    for x in new:
        if x.is_floating_point():
            x.view(-1)[::7] = math.inf
            x.view(-1)[::5] = -math.inf
            x.view(-1)[::11] = math.nan
            x.view(-1)[-1] = torch.finfo(x.dtype).max
    expected_kept, expected = [torch.zeros_like(x) for x in own], [x.clone() for x in own]
    carry_reference(expected_kept, expected, new)
    carry_fused(make_table(own), kept, own, new)
    for mine, theirs in zip([*kept, *own], [*expected_kept, *expected], strict=True):
        assert torch.equal(mine, theirs)
        assert not theirs.is_floating_point() or theirs.isfinite().all()
    assert any(x.isnan().any() for x in new)


def test_nothing_beside_the_tensors_is_written():
    sizes = (1, 2, 3, 5, 1023)
    kept, own, new = ([amid_nan(torch.randn(size, device=DEVICE)) for size in sizes] for _ in range(3))
    before = [x.clone() for x in own]
    carry_fused(make_table(own), kept, own, new)
    for x, was, after, had in zip(own, new, kept, before, strict=True):
        assert torch.equal(x, was)
        assert torch.equal(after, had)
        assert is_amid_nan(x)
        assert is_amid_nan(after)


def test_what_the_launch_would_misread_is_refused():
    own = [torch.zeros(4, 4, device=DEVICE)]
    with pytest.raises(ValueError, match="contiguous"):
        carry_fused(make_table(own), own, own, [own[0].t()])
    with pytest.raises(ValueError, match="words"):
        make_table([torch.zeros(3, dtype=torch.float16, device=DEVICE)])


def test_compiles_without_spills():
    signature = {"table_ptr": "*i64", "block_ptr": "*i32"}
    compiled = check_compiled(
        [CompileCase("kernels.carry.fused", "carry_kernel", signature, {"BLOCK": 1024, "PART": 4096}, 4)],
        read_code=True,
    )
    # Four words at a time, and one at a time where the last four are not all there.
    for each in compiled:
        assert "STG.E.128" in each.machine_code
        assert "STG.E desc" in each.machine_code or "STG.E [" in each.machine_code
