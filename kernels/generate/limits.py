"""What the generating launch can hold."""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import torch

from kernels.generate.layout import BrainShape
from kernels.generate.tiles import MAX_PACKET_LANES, MAX_ROOM_BYTES, choose_packets, packet_room

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


def has_bulk_copies(device: torch.device) -> bool:
    """Whether the kernel for one lane can run there: its copies, and 200 KB of shared memory in flight, came with
    Hopper. On a CPU Triton interprets it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def check_quantized(shape: BrainShape, num_lanes: int, device: torch.device) -> None:
    """Raise ValueError unless the launch can hold such a brain in 8 bits, and so many lanes, on this device."""
    check_shape(shape, num_lanes)
    if not has_bulk_copies(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(f"generate: the GPU has compute capability {major}.{minor}; int8 weights need 9.0 or more")
    if num_lanes > MAX_PACKET_LANES:
        raise ValueError(f"generate: {num_lanes} lanes; int8 weights are for one")
    tiles = choose_packets(shape, torch.int8, 132)
    if packet_room(shape, tiles.GRANULES * tiles.G) > MAX_ROOM_BYTES:
        raise ValueError(
            f"generate: width {shape.width} and mlp_width {shape.mlp_width} are too much for int8 weights; a phase's "
            f"activations must fit {MAX_ROOM_BYTES // 1024} KB"
        )
