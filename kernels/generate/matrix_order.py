"""The order in which a launch reads the matrices of a brain, and what each is for."""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import triton.language as tl

from kernels.generate.layout import BrainShape

# What a phase multiplies by.
CORTEX_IN = tl.constexpr(0)
MEMORY_IN = tl.constexpr(1)
OUT = tl.constexpr(2)
MLP_IN = tl.constexpr(3)
MLP_OUT = tl.constexpr(4)
DECODE = tl.constexpr(5)


def matrices_in_order(shape: BrainShape) -> list[tuple[int, int, int, int, int, int]]:
    """In the order they are read: what a matrix is for, its layer, its offset in `matrices`, its rows, its channels and
    whether it is a pair."""
    width, mlp_width = shape.width, shape.mlp_width
    order, offset = [], 0
    num_layers = shape.num_cortex + shape.num_memory
    for layer in range(num_layers):
        if shape.num_wernicke <= layer < shape.num_wernicke + shape.num_memory:
            first = (MEMORY_IN.value, 4 * width, width, 1)
        else:
            first = (CORTEX_IN.value, width, width, 2)
        rest = [(OUT.value, width, width, 1), (MLP_IN.value, mlp_width, width, 2), (MLP_OUT.value, width, mlp_width, 1)]
        for kind, num_rows, width_in, halves in [first, *rest]:
            order.append((kind, layer, offset, num_rows, width_in, halves))
            offset += num_rows * width_in * halves
    order.append((DECODE.value, num_layers, 0, shape.vocab_size, width, 1))
    return order
