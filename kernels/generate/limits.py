"""What the generating launch can hold."""

from kernels.generate.layout import BrainShape

MAX_LANES = 64
SPIKES = ("graded", "binary")  # a smooth unit is a yardstick for training; it is generated from token by token


def check_shape(shape: BrainShape, num_lanes: int) -> None:
    """Raise ValueError unless the launch can hold such a brain and so many lanes."""
    if shape.spike_kind not in SPIKES:
        raise ValueError(f"generate: spike is {shape.spike_kind!r}; the launch knows {' and '.join(SPIKES)} ones")
    for name, width in (("column_width", shape.column_width), ("head_width", shape.head_width)):
        if width < 16 or width > 256 or width & (width - 1):
            raise ValueError(f"generate: {name} is {width}; the launch needs a power of two from 16 to 256")
    if shape.width % 16 or shape.mlp_width % 16:
        raise ValueError(f"generate: width {shape.width} and mlp_width {shape.mlp_width} must be multiples of 16")
    if not 1 <= num_lanes <= MAX_LANES:
        raise ValueError(f"generate: {num_lanes} lanes; one launch takes 1 to {MAX_LANES}")
