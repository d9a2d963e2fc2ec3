"""The memory's kernel launches: tensors, strides and block sizes of one call."""

import kernels.launch  # noqa: F401, I001  before triton
from functools import lru_cache

import torch
import triton
from torch import Tensor

from kernels.launch import INTERPRETED
from kernels.memory.chunk_backward import memory_state_gradient_kernel
from kernels.memory.chunk_forward import memory_forward_kernel, triangular_inverse_kernel
from kernels.memory.chunk_gradient import memory_gradient_kernel
from kernels.memory.chunk_parallel import (
    memory_chunk_output_kernel,
    memory_chunk_sum_kernel,
    memory_chunk_walk_kernel,
)
from kernels.memory.launch_table import Launch, LaunchTable, ParallelTable, parallel_table

PARALLEL = True  # whether chunks of few streams run in parallel; off to compare


def row_readable(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous and offsets within a chunk fit in 32 bits; otherwise a copy."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


@lru_cache
def _properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in the stubs
    return properties.multi_processor_count, shared


def _num_processors(x: Tensor) -> int:
    return 2 if INTERPRETED else _properties(x.device.index or 0)[0]


def has_large_shared(x: Tensor) -> bool:
    """Whether a block on the tensor's device may take the 227 KB of shared memory of an H100 or H200."""
    return INTERPRETED or _properties(x.device.index or 0)[1] >= 227 * 1024


class Call:
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
        self.query, self.key, self.value = row_readable(query), row_readable(key), row_readable(value)
        self.forget, self.write, self.start = forget_logit, write_logit, document_start
        self.absent = value.new_empty(0)  # stands where a kernel is given nothing, and reads nothing
        self.delta = write_logit is not None
        self.eps, self.table = eps, table
        num_lanes, self.num_tokens, self.num_heads, self.width = value.shape
        self.num_streams = num_lanes * self.num_heads
        self.num_chunks = triton.cdiv(self.num_tokens, table.length)

    @property
    def num_walks(self) -> int:
        """Programs of the backward pass's two walks over chunks, or what stands for them."""
        if self.is_parallel:
            return 2 * self.num_streams * self.num_chunks
        tiles = (self.table.recompute.tile, self.table.state_gradient.tile)
        return sum(self.num_streams * (self.width // tile) for tile in tiles)

    @property
    def is_parallel(self) -> bool:
        """Whether chunks run in parallel: walks would leave half of the multiprocessors or more without a program."""
        is_taken = not self.delta and (INTERPRETED or self.value.dtype != torch.float32)
        # Whatever the number of tokens: a step has as many launches for long sequences as for short ones.
        return PARALLEL and is_taken and 2 * self.num_streams <= _num_processors(self.value)

    def _parallel_table(self) -> ParallelTable:
        return parallel_table(self.width, large_shared=has_large_shared(self.value))

    def _gradient_launch(self) -> Launch:
        launch = self._parallel_table().gradient if self.is_parallel else None
        is_alone = self.num_streams * self.num_chunks <= _num_processors(self.value)
        return launch if launch is not None and is_alone else self.table.gradient

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
            **launch.options(),
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
        if self.is_parallel:
            self._forward_in_parallel(state, output, final_state, states)
            return
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
            **launch.options(),
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
        output_grad = row_readable(output_grad)
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
        if self.is_parallel:
            self._walk_sums(self.query, output_grad, final_state_grad, state_grads, state_grad, backward=True)
            return state_grad
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
            **launch.options(),
        )
        return state_grad

    def _forward_in_parallel(
        self, state: Tensor, output: Tensor | None, final_state: Tensor | None, states: Tensor | None
    ) -> None:
        if states is None:
            states = self.value.new_empty(self.num_streams, self.num_chunks, self.width, self.width)
        self._walk_sums(self.key, self.value, state, states, final_state, backward=False)
        if output is not None:
            self._outputs(states, output)

    def _walk_sums(
        self,
        left: Tensor,
        right: Tensor,
        state: Tensor | None,
        states: Tensor,
        final_state: Tensor | None,
        *,
        backward: bool,
    ) -> None:
        """Fill states with those before every chunk, or, backward, with the gradients of those after it."""
        table = self._parallel_table()
        sums = torch.empty(states.shape, dtype=torch.float32, device=states.device)
        carries = torch.empty(states.shape[:2], dtype=torch.float32, device=states.device)
        memory_chunk_sum_kernel[(self.num_streams * self.num_chunks, self.width // table.sum.tile)](
            left,
            right,
            self.forget,
            self._given(self.start),
            sums,
            carries,
            *self._strides(left),
            *self._strides(right),
            *self._strides(self.forget),
            *self._start_strides(),
            self.num_tokens,
            self.num_heads,
            self.eps,
            **self._common(),
            TILE=table.sum.tile,
            TO_END=not backward,
            **table.sum.options(),
        )
        if final_state is None:  # not asked for, and needs somewhere to go
            final_state = torch.empty(self.num_streams, *states.shape[2:], dtype=torch.float32, device=states.device)
        memory_chunk_walk_kernel[(self.num_streams, self.width**2 // table.walk.tile)](
            sums,
            carries,
            self._given(state),
            states,
            final_state,
            self.num_chunks,
            SIZE=self.width**2,
            BLOCK=table.walk.tile,
            BACKWARD=backward,
            HAS_STATE=state is not None,
            **table.walk.options(),
        )

    def _outputs(self, states: Tensor, output: Tensor) -> None:
        launch = self._parallel_table().output
        memory_chunk_output_kernel[(self.num_streams * self.num_chunks, self.width // launch.tile)](
            self.query,
            self.key,
            self.value,
            self.forget,
            self._given(self.start),
            states,
            output,
            *self._strides(self.query),
            *self._strides(self.key),
            *self._strides(self.value),
            *self._strides(self.forget),
            *self._start_strides(),
            self.num_tokens,
            self.num_heads,
            self.eps,
            **self._common(),
            TILE=launch.tile,
            **launch.options(),
        )

    def gradient(
        self,
        states: Tensor,
        state_grads: Tensor,
        writes: Tensor,
        surprise_grad: Tensor,
        output_grad: Tensor,
        out: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Fill out with the gradients of query, key and value; returns those of forget_logit and write_logit."""
        launch = self._gradient_launch()
        output_grad = row_readable(output_grad)
        device = self.value.device
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
            *out,
            forget_grad,
            write_grad,
            *self._strides(self.query),
            *self._strides(self.key),
            *self._strides(self.value),
            *self._strides(self.forget),
            *self._strides(self.write),
            *self._start_strides(),
            *self._strides(output_grad),
            *self._strides(out[0]),
            self.num_tokens,
            self.num_heads,
            self.eps,
            **self._common(),
            TILE=launch.tile,
            DELTA=self.delta,
            **launch.options(),
        )
        return forget_grad, write_grad
