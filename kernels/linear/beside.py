"""Weight gradients on a stream of their own, beside launches that leave most of the GPU idle.

A recurrent scan over a few lanes is a dozen programs, and what a weight's gradient is needed for comes after the whole
backward pass. So inside `weight_gradients_beside` these gradients are put off until the next `idle_gpu` (a scan's
launches), start together with it on another stream, and are in the weights' `.grad` when the context ends. Give the
stream that the context is opened on a higher priority (`torch.cuda.Stream(priority=-1)`): then the scan's programs are
placed first, and later launches of the backward pass go before whatever products are left.

Only gradients that nobody needs earlier are put off: those of leaves that had no gradient and no hook when the context
was opened. Others are returned to autograd, made at once.

Such a gradient is written once, by one product, and read twice, by the norm and the optimiser; with few rows that is
what a step's time goes to. So the context may have them stored in half precision, rounded once from sums in float32.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kernels.linear.products import add_product, product

# What a put-off gradient is made of lives until the context ends. It may be as large as the gradient itself, or this;
# with more rows than that the GPU is busy anyway.
_MIN_KEPT_BYTES = 2**20
# Before torch 2.10 the gradient of a float32 tensor is float32.
HOLDS_HALF_GRADIENTS = hasattr(Tensor, "grad_dtype")

Compute = Callable[[Tensor], object]  # writes a gradient into the tensor given

_streams: dict[torch.device, torch.cuda.Stream] = {}  # one a device: cuBLAS keeps a workspace for every stream
_open: "PutOff | None" = None


class PutOff:
    """Gradients of some leaves that are still to be made, in the order they will be made in.

    Arguments:
        weights: whose gradients may be put off.
        device: theirs.
        stream: where they are made; None: on the current one.
        half: the type that gradients are stored in whose product's operands have it; None: the weight's own.
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        device: torch.device,
        stream: torch.cuda.Stream | None,
        *,
        half: torch.dtype | None = None,
    ) -> None:
        assert half is None or HOLDS_HALF_GRADIENTS, "this torch keeps gradients in their weight's type"
        self.half = half
        self._weights = {id(weight) for weight in weights if _is_unread(weight)}
        self._stream = stream
        self._main = None if stream is None else torch.cuda.current_stream(device)
        self._device = device
        self._waiting: list[tuple[Compute, Tensor]] = []
        self._begun: list[tuple[Compute, Tensor]] = []  # and with them what they read
        self._made: list[tuple[Tensor, Tensor]] = []

    def takes(self, weights: Sequence[Tensor], operands: Sequence[Tensor]) -> bool:
        """Whether the gradient of `weights`, which lie one above another in it, can be put off."""
        if any(weight.dtype != weights[0].dtype for weight in weights):
            return False
        return all(self.takes_made(weight) for weight in weights) and _are_few(weights, operands) and self._is_main()

    def takes_made(self, weight: Tensor) -> bool:
        """Whether `give` takes a gradient of this weight."""
        return id(weight) in self._weights

    def give(self, weight: Tensor, gradient: Tensor) -> None:
        """Have a gradient that is made already."""
        self._weights.remove(id(weight))  # a second gradient is autograd's to return
        self._made.append((weight, gradient))

    def put(self, weights: Sequence[Tensor], gradient: Tensor, compute: Compute) -> None:
        """Have `compute` write into `gradient` later."""
        self._waiting.append((compute, gradient))
        self._weights -= {id(weight) for weight in weights}  # a second gradient is autograd's to return
        parts = gradient[: sum(map(len, weights))].split([len(weight) for weight in weights])
        self._made += zip(weights, parts)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What waits begins together with what is launched inside."""
        if not self._waiting or not self._is_main():
            yield
            return
        waiting, self._waiting = self._waiting, []
        begins = None if self._main is None else self._main.record_event()
        yield
        self._begin(waiting, begins)

    def finish(self) -> None:
        """Make the rest, and give the weights their gradients."""
        self._begin(self._waiting, None if self._main is None else self._main.record_event())
        self.join()
        for weight, gradient in self._made:
            if weight.grad is not None:
                gradient = weight.grad + gradient
            if gradient.dtype != weight.dtype:
                weight.grad_dtype = None  # type: ignore[attr-defined]  # any; the next one may be of either type
            weight.grad = gradient

    def join(self) -> None:
        """Let the main stream wait for what has begun; then what that reads may be freed."""
        if self._main is not None and self._stream is not None and self._begun:
            self._main.wait_stream(self._stream)
        self._waiting, self._begun = [], []

    def _is_main(self) -> bool:
        return self._main is None or torch.cuda.current_stream(self._device) == self._main

    @torch.no_grad()
    def _begin(self, waiting: list[tuple[Compute, Tensor]], begins: torch.cuda.Event | None) -> None:
        if not waiting:
            return
        self._begun += waiting
        if self._stream is not None and begins is not None:
            self._stream.wait_event(begins)
        with torch.cuda.stream(self._stream):
            for compute, gradient in waiting:
                compute(gradient)


def _is_unread(weight: Tensor) -> bool:
    """Whether nobody sees this leaf's gradient before the backward pass has ended."""
    hooks = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return weight.requires_grad and weight.is_leaf and weight.grad is None and not hooks


def _are_few(weights: Sequence[Tensor], operands: Sequence[Tensor]) -> bool:
    kept, made = (sum(x.numel() * x.element_size() for x in tensors) for tensors in (operands, weights))
    return kept <= max(made, _MIN_KEPT_BYTES)


@contextlib.contextmanager
def weight_gradients_beside(weights: Iterable[Tensor], *, half: torch.dtype | None = None) -> Iterator[None]:
    """Around `backward()`: some gradients of `weights` are made on another stream, the same numbers as without.

    They are in `.grad` when the context ends, not before, and the current stream waits for them there. Without weights,
    or where they are not on a GPU, the context does nothing. It may be recorded in a CUDA graph.

    Arguments:
        weights: leaves on one device, whose gradients nobody but the caller reads: not those of a model that exchanges
            gradients with other processes during its backward pass.
        half: `.grad` may be of this type where a float32 weight's gradient is one product of operands of it, or one
            rounded sum; needs HOLDS_HALF_GRADIENTS. None where further gradients will be added to these.
    """
    weights = list(weights)
    device = weights[0].device if weights else torch.device("cpu")
    if device.type != "cuda":
        yield
        return
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    with opened(PutOff(weights, device, _streams[device], half=half)):
        yield


@contextlib.contextmanager
def opened(put_off: PutOff) -> Iterator[None]:
    """Gradients go to `put_off` inside."""
    global _open
    assert _open is None, "weight_gradients_beside does not nest"
    _open = put_off
    try:
        yield
        put_off.finish()
    finally:
        _open = None
        put_off.join()


def idle_gpu() -> contextlib.AbstractContextManager[None]:
    """Around launches that leave most of the GPU idle: gradients that were put off begin with them."""
    return contextlib.nullcontext() if _open is None else _open.beside()


def stored_dtype(weight: Tensor, operand: Tensor) -> torch.dtype:
    """The type that a gradient of `weight`, which the rows of `operand` are summed into once, is to be stored in and
    then passed to `handed_over`; the weight's own where it goes another way."""
    if _open is None or _open.half is None or not _open.takes_made(weight) or not _are_few([weight], [operand]):
        return weight.dtype
    return _open.half


def handed_over(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """The gradient in the weight's type, for autograd; None if it is kept for the end of the context instead."""
    if _open is None or gradient.dtype == weight.dtype or not _open.takes_made(weight):
        return gradient.to(weight.dtype)
    _open.give(weight, gradient)
    return None


def product_gradients(weights: Sequence[Tensor], a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
    """a b `[M, N]`, the gradient of `weights`, one above another in its first rows.

    Returns:
        Each weight's in its own type; None where it was put off, to be in `.grad` later, in half precision if the
        context says so.
    """
    dtype = weights[0].dtype
    for weight in weights[1:]:
        dtype = torch.promote_types(dtype, weight.dtype)
    return _gradients(
        weights,
        (a.shape[0], b.shape[1]),
        (a, b),
        at_once=lambda: product(a, b, dtype),
        later=lambda out: add_product(out, a, b, is_first=True),
    )


def sum_gradient(bias: Tensor, rows: Tensor) -> Tensor | None:
    """The sum of `rows` `[N, M]`, the gradient of `bias`, or None where it was put off."""
    (gradient,) = _gradients(
        (bias,), rows.shape[1:], (rows,), at_once=lambda: rows.sum(0), later=lambda out: torch.sum(rows, 0, out=out)
    )
    return gradient


def _gradients(
    weights: Sequence[Tensor],
    shape: Sequence[int],
    operands: Sequence[Tensor],
    *,
    at_once: Callable[[], Tensor],
    later: Compute,
) -> tuple[Tensor | None, ...]:
    if _open is not None and _open.takes(weights, operands):
        # Memory of the main stream, which has done with it when the other stream begins.
        is_half = len(operands) > 1 and operands[0].dtype == _open.half  # one operand is a bias's sum, a few numbers
        dtype = operands[0].dtype if is_half else weights[0].dtype
        gradient = torch.empty(shape, dtype=dtype, device=operands[0].device)
        _open.put(weights, gradient, later)
        return (None,) * len(weights)
    gradient = at_once()
    parts = gradient[: sum(map(len, weights))].split([len(weight) for weight in weights])
    return tuple(part.to(weight.dtype) for part, weight in zip(parts, weights))
