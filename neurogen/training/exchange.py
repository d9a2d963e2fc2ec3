"""Gradients summed over processes: packed into a few large buffers, one all-reduce each.

The sum is taken after the whole backward pass, by the same launches in every step, so that it can be part of a recorded
one, and so that gradients may until then be made in any order and on any stream. It is not hidden behind that pass: it
takes about the gradients' bytes / 300 GB/s between GPUs that NVLink connects, 0.3 ms for the 76 MB of `small` and 4 ms
for the 1.3 GB of `base`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Large enough for the full bandwidth, small enough to be had besides the gradients: each bucket takes the place of its
# gradients before the next one is made.
BUCKET_BYTES = 2**26
_MULTIPLE = 32  # numbers; the kernels that read gradients want them to begin on 16 bytes


@torch.no_grad()
def sum_gradients(params: Sequence[Tensor]) -> None:
    """Replace every `.grad` by its sum over all ranks, the same bits on each of them.

    All ranks call it with parameters of the same sizes in the same order, and the host does not wait. A gradient that a
    rank does not have counts as zero there, so that nobody waits for it in vain; afterwards every parameter has one, in
    its own type: sums over processes are not rounded to half precision.
    """
    for bucket in _buckets(params):
        sizes = [-(-param.numel() // _MULTIPLE) * _MULTIPLE for param in bucket]
        buffer = torch.empty(sum(sizes), dtype=bucket[0].dtype, device=bucket[0].device)  # nobody reads the gaps
        parts = [part[: param.numel()].view(param.shape) for part, param in zip(buffer.split(sizes), bucket)]
        grads = [param.grad for param in bucket if param.grad is not None]
        if grads:
            torch._foreach_copy_([part for part, param in zip(parts, bucket) if param.grad is not None], grads)
        for part, param in zip(parts, bucket):
            if param.grad is None:
                part.zero_()
        dist.all_reduce(buffer)
        for part, param in zip(parts, bucket):
            param.grad = part


def _buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, as many as BUCKET_BYTES hold or one that is larger."""
    for _, alike in itertools.groupby(params, lambda param: param.dtype):
        bucket: list[Tensor] = []
        held = 0
        for param in alike:
            num_bytes = param.numel() * param.element_size()
            if bucket and held + num_bytes > BUCKET_BYTES:
                yield bucket
                bucket, held = [], 0
            bucket.append(param)
            held += num_bytes
        yield bucket
