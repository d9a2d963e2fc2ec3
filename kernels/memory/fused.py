"""Fast-weight memory in Triton: one forward walk over chunks, and a backward pass that recomputes the states.

Storage is float32 or bfloat16 and the state float32; products of bfloat16 storage run on the tensor cores. Nothing is
kept for the backward pass but the arguments and, for the delta rule, one L x L matrix a chunk and head.
"""

import kernels.launch  # noqa: F401, I001  before triton
from functools import lru_cache

import torch
import triton
from torch import Tensor

from kernels.launch import INTERPRETED, check_launchable
from kernels.memory.chunk_backward import memory_gradient_kernel, memory_state_gradient_kernel
from kernels.memory.chunk_forward import memory_forward_kernel, triangular_inverse_kernel
from kernels.memory.launch_table import LaunchTable, launch_table
from kernels.memory.reference import RULES

WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16)


def memory_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forget_logit: Tensor,
    write_logit: Tensor | None,
    state: Tensor,
    document_start: Tensor | None = None,
    *,
    rule: str = "hebbian",
    chunk_size: int = 64,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Write keys and values into fast weights and read them with queries; formulas and shapes of `memory_reference`.

    Arguments:
        query, key, value: `[B, T, H, N]` of one type, float32 or bfloat16, N 16, 32, 64 or 128; views whose last
            dimension is contiguous are read in place.
        forget_logit, write_logit, state, document_start, rule, eps: as in `memory_reference`.
        chunk_size: the reference's; here the chunk's length is set by type, width and GPU, and means as little.

    Returns:
        o `[B, T, H, N]` in the values' type, and the state after the last token in float32.
    """
    if rule not in RULES:
        raise ValueError(f"memory rule is {rule!r}; choose one of {', '.join(RULES)}")
    if (write_logit is not None) != (rule == "delta"):
        raise ValueError(f"write_logit goes with the delta rule alone, and the rule is {rule!r}")
    check_launchable("memory", query, key, value, forget_logit, write_logit, state, document_start)
    if value.dtype not in DTYPES or query.dtype != value.dtype or key.dtype != value.dtype:
        raise ValueError(
            f"memory: query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; "
            "give all three as float32 or all three as bfloat16"
        )
    if value.shape[-1] not in WIDTHS:
        raise ValueError(f"memory: head width is {value.shape[-1]}; fused kernels are written for 16, 32, 64 and 128")
    if value.numel() == 0:
        return value, state.to(torch.float32)
    output, final_state, _ = memory_forward(query, key, value, forget_logit, write_logit, state, document_start, eps)
    return output, final_state


@torch.library.custom_op("neurogen::memory_forward", mutates_args=())
def memory_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forget_logit: Tensor,
    write_logit: Tensor | None,
    state: Tensor,
    document_start: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state, and the delta rule's inverses `[B * H, num_chunks, L, L]` (empty for the Hebbian rule)."""
    table = _table(value, write_logit)
    call = _Call(query, key, value, forget_logit, write_logit, document_start, eps, table)
    inverse = call.inverse()
    output = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    final_state = torch.empty(state.shape, dtype=torch.float32, device=value.device)
    call.forward(inverse, state.float().contiguous(), output=output, final_state=final_state)
    return output, final_state, inverse


@memory_forward.register_fake
def _(query, key, value, forget_logit, write_logit, state, document_start, eps):
    num_lanes, num_tokens, num_heads, _ = value.shape
    inverse = value.new_empty(0)
    if write_logit is not None:
        length = _table(value, write_logit).length
        inverse = value.new_empty(num_lanes * num_heads, -(-num_tokens // length), length, length)
    output = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return output, torch.empty(state.shape, dtype=torch.float32, device=value.device), inverse


@torch.library.custom_op("neurogen::memory_backward", mutates_args=())
def memory_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forget_logit: Tensor,
    write_logit: Tensor | None,
    state: Tensor,
    document_start: Tensor | None,
    inverse: Tensor,
    output_grad: Tensor,
    final_state_grad: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, forget_logit, write_logit (empty for the Hebbian rule) and state."""
    table = _table(value, write_logit)
    call = _Call(query, key, value, forget_logit, write_logit, document_start, eps, table)
    num_chunks = triton.cdiv(value.shape[1], table.length)
    states = value.new_empty(state.shape[0] * state.shape[1], num_chunks, *state.shape[2:])
    state_grads = torch.empty_like(states)
    writes = torch.empty(value.shape if call.delta else 0, dtype=value.dtype, device=value.device)
    surprise_grad = torch.empty_like(writes)
    call.forward(inverse, state.float().contiguous(), states=states, writes=writes)
    state_grad = call.state_gradient(inverse, output_grad, final_state_grad, state_grads, surprise_grad)
    grads = call.gradient(states, state_grads, writes, surprise_grad, output_grad)
    return *grads, state_grad.to(state.dtype)


@memory_backward.register_fake
def _(
    query,
    key,
    value,
    forget_logit,
    write_logit,
    state,
    document_start,
    inverse,
    output_grad,
    final_state_grad,
    eps,
):
    def like(x):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    write_grad = value.new_empty(0) if write_logit is None else like(write_logit)
    return like(query), like(key), like(value), like(forget_logit), write_grad, like(state)


def _save_for_backward(ctx, inputs, output):
    *tensors, eps = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.eps = eps
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, output_grad, final_state_grad, _):
    *inputs, inverse = ctx.saved_tensors
    value, write_logit = inputs[2], inputs[4]
    if output_grad is None:
        output_grad = torch.zeros_like(value)
    *grads, write_grad, state_grad = memory_backward(*inputs, inverse, output_grad, final_state_grad, ctx.eps)
    return *grads, None if write_logit is None else write_grad, state_grad, None, None


memory_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


@lru_cache
def _has_large_shared(index: int) -> bool:
    properties = torch.cuda.get_device_properties(index)
    return properties.shared_memory_per_block_optin >= 227 * 1024  # type: ignore[attr-defined]  # not in the stubs


def _table(value: Tensor, write_logit: Tensor | None) -> LaunchTable:
    large_shared = INTERPRETED or _has_large_shared(value.device.index or 0)
    width = int(value.shape[-1])  # a graph with symbolic shapes is specialised to the head width
    return launch_table(value.dtype, width, delta=write_logit is not None, large_shared=large_shared)


def _row_readable(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous and offsets within a chunk fit in 32 bits; otherwise a copy."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


class _Call:
    """One call's tensors, strides and block sizes."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        forget_logit: Tensor,
        write_logit: Tensor | None,
        document_start: Tensor | None,
        eps: float,
        table: LaunchTable,
    ) -> None:
        self.query, self.key, self.value = _row_readable(query), _row_readable(key), _row_readable(value)
        self.forget, self.write, self.start = forget_logit, write_logit, document_start
        self.absent = value.new_empty(0)  # stands where a kernel is given nothing, and reads nothing
        self.delta = write_logit is not None
        self.eps, self.table = eps, table
        num_lanes, self.num_tokens, self.num_heads, self.width = value.shape
        self.num_streams = num_lanes * self.num_heads
        self.num_chunks = triton.cdiv(self.num_tokens, table.length)

    def _given(self, x: Tensor | None) -> Tensor:
        return self.absent if x is None else x

    def _strides(self, x: Tensor | None) -> tuple[int, ...]:
        return (0, 0, 0) if x is None else x.stride()[:3]

    def _start_strides(self) -> tuple[int, ...]:
        return (0, 0) if self.start is None else self.start.stride()

    def _common(self) -> dict[str, object]:
        return {
            "WIDTH": self.width,
            "LENGTH": self.table.length,
            "HAS_STARTS": self.start is not None,
        }

    def inverse(self) -> Tensor:
        if not self.delta:
            return self.value.new_empty(0)
        length, launch = self.table.length, self.table.inverse
        inverse = self.value.new_empty(self.num_streams, self.num_chunks, length, length)
        triangular_inverse_kernel[(self.num_streams * self.num_chunks,)](
            self.key,
            self.forget,
            self._given(self.write),
            self._given(self.start),
            inverse,
            *self._strides(self.key),
            *self._strides(self.forget),
            *self._strides(self.write),
            *self._start_strides(),
            self.num_tokens,
            self.num_heads,
            self.eps,
            **self._common(),
            LEVELS=length.bit_length() - 1,
            PRECISION="ieee" if self.value.dtype == torch.float32 else "tf32",
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        return inverse

    def forward(
        self,
        inverse: Tensor,
        state: Tensor,
        *,
        output: Tensor | None = None,
        final_state: Tensor | None = None,
        states: Tensor | None = None,
        writes: Tensor | None = None,
    ) -> None:
        """Fill output and final_state, or states and writes."""
        launch = self.table.forward if states is None else self.table.recompute
        memory_forward_kernel[(self.num_streams, self.width // launch.tile)](
            self.query,
            self.key,
            self.value,
            self.forget,
            self._given(self.write),
            self._given(self.start),
            inverse,
            state,
            self._given(output),
            self._given(final_state),
            self._given(states),
            self._given(writes),
            *self._strides(self.query),
            *self._strides(self.key),
            *self._strides(self.value),
            *self._strides(self.forget),
            *self._strides(self.write),
            *self._start_strides(),
            self.num_tokens,
            self.num_heads,
            self.eps,
            **self._common(),
            TILE=launch.tile,
            DELTA=self.delta,
            RECOMPUTE=states is not None,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )

    def state_gradient(
        self,
        inverse: Tensor,
        output_grad: Tensor,
        final_state_grad: Tensor | None,
        state_grads: Tensor,
        surprise_grad: Tensor,
    ) -> Tensor:
        """Fill state_grads and surprise_grad; returns the incoming state's gradient."""
        launch = self.table.state_gradient
        output_grad = _row_readable(output_grad)
        if final_state_grad is not None:
            final_state_grad = final_state_grad.float().contiguous()
        state_grad = torch.empty(
            self.value.shape[0],
            self.num_heads,
            self.width,
            self.width,
            dtype=torch.float32,
            device=self.value.device,
        )
        memory_state_gradient_kernel[(self.num_streams, self.width // launch.tile)](
            self.query,
            self.key,
            self.forget,
            self._given(self.write),
            self._given(self.start),
            inverse,
            output_grad,
            self._given(final_state_grad),
            state_grads,
            surprise_grad,
            state_grad,
            *self._strides(self.query),
            *self._strides(self.key),
            *self._strides(self.forget),
            *self._strides(self.write),
            *self._start_strides(),
            *self._strides(output_grad),
            self.num_tokens,
            self.num_heads,
            self.eps,
            **self._common(),
            TILE=launch.tile,
            DELTA=self.delta,
            HAS_STATE_GRAD=final_state_grad is not None,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        return state_grad

    def gradient(
        self,
        states: Tensor,
        state_grads: Tensor,
        writes: Tensor,
        surprise_grad: Tensor,
        output_grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of query, key, value, forget_logit and write_logit."""
        launch = self.table.gradient
        output_grad = _row_readable(output_grad)
        device = self.value.device
        query_grad, key_grad, value_grad = (
            torch.empty(self.value.shape, dtype=self.value.dtype, device=device) for _ in range(3)
        )
        forget_grad = torch.empty(self.forget.shape, dtype=self.forget.dtype, device=device)
        write_grad = self.value.new_empty(0)
        if self.write is not None:
            write_grad = torch.empty(self.write.shape, dtype=self.write.dtype, device=device)
        memory_gradient_kernel[(self.num_streams * self.num_chunks,)](
            self.query,
            self.key,
            self.value,
            self.forget,
            self._given(self.write),
            self._given(self.start),
            states,
            state_grads,
            writes,
            surprise_grad,
            output_grad,
            query_grad,
            key_grad,
            value_grad,
            forget_grad,
            write_grad,
            *self._strides(self.query),
            *self._strides(self.key),
            *self._strides(self.value),
            *self._strides(self.forget),
            *self._strides(self.write),
            *self._start_strides(),
            *self._strides(output_grad),
            self.num_tokens,
            self.num_heads,
            self.eps,
            **self._common(),
            TILE=launch.tile,
            DELTA=self.delta,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        return query_grad, key_grad, value_grad, forget_grad, write_grad
