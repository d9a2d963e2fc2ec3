"""A few float32 columns rounded into a wider half-precision matrix, in one launch."""

import kernels.launch  # noqa: F401, I001  before triton: it chooses the interpreter
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 32


@triton.jit
def write_columns_kernel(
    left_ptr,  # [N, H]
    right_ptr,  # [N, H], unless not HAS_RIGHT
    out_ptr,  # [N, WIDTH], rows `stride` apart
    num_rows,
    stride,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_w = tl.arange(0, BLOCK_W)
    exists = (o_n < num_rows)[:, None]
    b_out = tl.load(left_ptr + o_n[:, None] * H + o_w[None, :], mask=exists & (o_w < H)[None, :], other=0.0)
    if HAS_RIGHT:
        in_right = ((o_w >= H) & (o_w < 2 * H))[None, :]
        b_out += tl.load(right_ptr + o_n[:, None] * H + (o_w - H)[None, :], mask=exists & in_right, other=0.0)
    p_out = out_ptr + o_n[:, None] * stride + o_w[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=exists & (o_w < WIDTH)[None, :])


def write_columns(out: Tensor, left: Tensor, right: Tensor | None = None) -> None:
    """Fill `out` `[N, W]`, whose last dimension is contiguous, with `left` `[N, H]`, `right` beside it, and zeros."""
    num_rows, width = out.shape
    if out.numel() == 0:
        return
    write_columns_kernel[(triton.cdiv(num_rows, _BLOCK_N),)](
        left.contiguous(),
        None if right is None else right.contiguous(),
        out,
        num_rows,
        out.stride(0),
        H=left.shape[1],
        WIDTH=width,
        HAS_RIGHT=right is not None,
        BLOCK_N=_BLOCK_N,
        BLOCK_W=triton.next_power_of_2(width),
        num_warps=4,
    )
