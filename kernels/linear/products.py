"""Products of half-precision matrices whose sums are kept in float32."""

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# Before torch 2.10 a product of half-precision matrices is stored in their own type; there it is rounded once before it
# becomes float32.
STORES_FLOAT32 = TorchVersion(torch.__version__) >= "2.10"


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b `[M, N]` in `dtype`, without rounding the sums to a's type on the way where torch can do that."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda and STORES_FLOAT32 and dtype == torch.float32:
        return torch.ops.aten.mm.dtype(a, b, dtype)
    return torch.mm(a, b).to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """total += a b, or total = a b at first; summed and stored in total's type."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if is_first else total.addmm_(a, b)
    elif a.is_cuda and STORES_FLOAT32:
        if is_first:
            torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        result = torch.mm(a, b)
        total.copy_(result) if is_first else total.add_(result)
