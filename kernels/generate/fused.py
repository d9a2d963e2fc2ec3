"""Generate N tokens in one cooperative Triton launch."""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import kernels.launch  # noqa: F401  first: it chooses the interpreter
from kernels.generate.kernel import generate_kernel
from kernels.generate.layout import BrainShape, GenerateOutput, PackedBrain, PackedState
from kernels.generate.limits import check_quantized, check_shape, has_bulk_copies
from kernels.generate.packet_kernel import packet_kernel
from kernels.generate.tiles import (
    MAX_PACKET_LANES,
    MAX_ROOM_BYTES,
    PacketTiles,
    Tiles,
    choose_packets,
    choose_tiles,
    packet_room,
)
from kernels.generate.turns import TurnTable, in_pieces, turn_scales
from kernels.generate.weight_bytes import BYTE_SUM, as_bytes
from kernels.launch import INTERPRETED, check_launchable, reserve_shared
from kernels.sample import Sampling


def generate_fused(
    brain: PackedBrain,
    state: PackedState,
    token_ids: Tensor,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seed: int,
    lanes: Tensor,
    stop_ids: Tensor,
    seen: Tensor | None = None,
) -> GenerateOutput:
    """See `kernels.generate.generate`; the number of launches does not depend on the number of tokens."""
    check_launchable("generate", token_ids, brain.embedding, brain.matrices, brain.vectors, *state)
    shape, num_lanes, device = brain.shape, token_ids.shape[0], token_ids.device
    check_shape(shape, num_lanes)
    num_programs = 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    is_int8 = brain.scales is not None
    if is_int8:
        check_quantized(shape, num_lanes, device)
    dtype = brain.matrices.dtype
    packets = choose_packets(shape, dtype, num_programs)
    # Activations of a brain with more than some 10,000 channels do not fit beside its tiles.
    fits = packet_room(shape, packets.GRANULES * packets.G) <= MAX_ROOM_BYTES
    is_packets = num_lanes <= MAX_PACKET_LANES and fits and has_bulk_copies(device)
    assert is_packets or not is_int8, "these tiles leave no room for the activations"
    tiles: PacketTiles | Tiles = packets
    if not is_packets:
        tiles = choose_tiles(shape, num_lanes, dtype, num_programs, shared_bytes=_shared_bytes(device))
    greedy = sampling.temperature == 0
    filters = {
        "TOP_K": 0 < sampling.top_k < shape.vocab_size,
        "TOP_P": sampling.top_p < 1,
        "MIN_P": sampling.min_p > 0,
    }
    penalty = sampling.repetition_penalty != 1
    assert seen is not None or not penalty, "a repetition penalty needs the tokens seen so far"

    cortex, fast_weight = state.cortex.clone(), state.fast_weight.clone()
    num_ids = shape.num_taps + max_new_tokens
    ids = torch.zeros(num_lanes, num_ids, dtype=torch.int64, device=device)
    ids[:, : shape.num_taps] = torch.cat([state.recent_ids, token_ids[:, None]], 1)
    log_probs = torch.zeros(num_lanes, max_new_tokens, device=device)
    lengths = torch.zeros(num_lanes, dtype=torch.int32, device=device)
    seen_bytes = seen.to(torch.int8) if penalty and seen is not None else lengths
    filtered = any(filters.values()) and not greedy
    if isinstance(tiles, PacketTiles):
        table = tiles.turns(shape)
        most = (2**31 - 1) // max(table.portions.shape[1], table.turns.shape[1])  # they are counted in 32 bits
        if max_new_tokens > most:
            raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; one launch draws at most {most}")
        weights = [brain.embedding, _in_pieces(brain, tiles), brain.vectors, _turn_scales(brain, table, tiles.R)]
        scratch = _packet_scratch(shape, num_programs, filtered, device, torch.int32 if tiles.NARROW else torch.int64)
        order: list[Tensor | int] = [*_on_device(table, device)]
        sizes = [table.portions.shape[1], table.turns.shape[1], 0]
    else:
        weights = [brain.embedding, brain.decoder, brain.matrices, brain.vectors]
        scratch = _scratch(shape, tiles, num_lanes, num_programs, filtered, brain.matrices)
        order, sizes = [num_lanes], []
    low, high = (_signed(seed & 0xFFFFFFFF), _signed((seed >> 32) & 0xFFFFFFFF))

    kernel = packet_kernel if is_packets else generate_kernel
    arguments = [
        *weights,
        ids,
        log_probs,
        lengths,
        seen_bytes,
        stop_ids,
        lanes,
        state.position,
        cortex,
        fast_weight,
        *scratch,
        torch.zeros(1, dtype=torch.int32, device=device),
        *order,
        shape.num_wernicke,
        shape.num_memory,
        shape.num_broca,
        num_ids,
        len(stop_ids),
        max_new_tokens,
        low,
        high,
        sampling.temperature,
        sampling.repetition_penalty,
        sampling.top_p,
        math.log(sampling.min_p) if sampling.min_p > 0 else 0.0,
        sampling.top_k,
        *sizes,
    ]
    constants: dict[str, Any] = dict(
        D=shape.width,
        C=shape.column_width,
        N=shape.head_width,
        M=shape.mlp_width,
        V=shape.vocab_size,
        TAPS=shape.num_taps,
        GRADED=shape.spike_kind == "graded",
        DELTA=shape.rule == "delta",
        GO=shape.go_gate,
        THETA=shape.threshold,
        BETA=shape.adaptation_strength,
        RHO=shape.adaptation_decay,
        EPS=shape.eps,
        GREEDY=greedy,
        PENALTY=penalty,
        **filters,
        BS=triton.next_power_of_2(max(len(stop_ids), 1)),
        SINGLE=num_programs == 1,
        **({"INT8": is_int8} if is_packets else {}),
        **tiles.constexprs(),
        num_warps=tiles.num_warps,
        launch_cooperative_grid=not INTERPRETED,
    )
    grid = (num_programs,)
    if isinstance(tiles, PacketTiles) and not INTERPRETED:
        arguments[-1] = reserve_shared(kernel.warmup(*arguments, grid=grid, **constants), tiles.ring_bytes)
    kernel[grid](*arguments, **constants)
    reads = torch.where(lengths > 0, lengths, max_new_tokens).to(torch.int64)
    recent = reads[:, None] + torch.arange(shape.num_taps - 1, device=device)
    new_state = PackedState(state.position + reads, ids.gather(1, recent), cortex, fast_weight)
    # Columns after the last lane's end were never written; nothing here waits to learn how many there are.
    column = torch.arange(max_new_tokens, device=device).minimum(reads[:, None] - 1)
    return GenerateOutput(ids[:, shape.num_taps :].gather(1, column), log_probs, reads, new_state)


# What is made once for as long as a tensor lives: of packed weights the pieces, and the scales in the order of turns;
# of a table its copies on devices.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _on_device(table: TurnTable, device: torch.device) -> tuple[Tensor, Tensor]:
    """The table's words, portions before turns, and its counts."""
    of_table = _kept.setdefault(table.turns, {})
    if device not in of_table:
        of_table[device] = (torch.cat([table.portions, table.turns], 1).to(device), table.counts.to(device))
    return of_table[device]


def _in_pieces(brain: PackedBrain, tiles: PacketTiles) -> Tensor:
    """The brain's weights in pieces of rows, which are made once; int8 weights as the bytes that the launch
    multiplies."""
    of_brain = _kept.setdefault(brain.matrices, {})
    key = ("pieces", tiles.R, tiles.WARPS, tiles.G)
    if key not in of_brain:
        pieces = in_pieces(brain.shape, brain.matrices, brain.decoder, tiles.R, tiles.WARPS, tiles.G)
        of_brain[key] = pieces if brain.scales is None else as_bytes(pieces)
    return of_brain[key]


def _turn_scales(brain: PackedBrain, table: TurnTable, rows: int) -> Tensor:
    """What each turn's sums are multiplied by, made once too; something of float32 where they are left as they are."""
    if brain.scales is None:
        return brain.vectors
    of_brain = _kept.setdefault(brain.matrices, {})
    key = ("scales", *table.turns.shape, rows)
    if key not in of_brain:
        of_brain[key] = turn_scales(brain.shape, table, brain.scales * BYTE_SUM, rows)
    return of_brain[key]


def _shared_bytes(device: torch.device) -> int:
    """Of shared memory that a program may have."""
    if INTERPRETED:
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in the stubs


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _scratch(
    shape: BrainShape, tiles: Tiles, num_lanes: int, num_programs: int, filtered: bool, like: Tensor
) -> list[Tensor]:
    """Activations between phases, in the kernel's order."""
    return [
        like.new_empty(num_lanes * shape.width, dtype=torch.float32),
        like.new_empty(num_lanes * shape.width),
        like.new_empty(num_lanes * shape.width),
        like.new_empty(num_lanes * shape.mlp_width),
        like.new_empty(num_lanes * shape.width * 4, dtype=torch.float32),
        # Read with the lanes that are padding, whose values count for nothing.
        like.new_zeros(tiles.BL * shape.width // min(tiles.PAIR.rows, tiles.CU), dtype=torch.float32),
        like.new_zeros(num_programs * tiles.BL, dtype=torch.float32),
        like.new_empty(num_lanes * shape.num_columns, dtype=torch.float32),
        like.new_empty(num_programs * num_lanes * 4, dtype=torch.float32),
        like.new_empty(num_programs * num_lanes, dtype=torch.int32),
        like.new_empty(3 * num_lanes * shape.vocab_size if filtered else 1, dtype=torch.float32),
    ]


def _packet_scratch(
    shape: BrainShape, num_programs: int, filtered: bool, device: torch.device, packets: torch.dtype
) -> list[Tensor]:
    """The same for the kernel of a single lane."""
    num_layers = shape.num_cortex + shape.num_memory
    num_packets = (num_layers + 1) * (8 * shape.width + shape.mlp_width) + shape.num_columns
    return [
        torch.zeros(num_packets, dtype=packets, device=device),
        torch.empty(8 * num_programs, device=device),
        torch.empty(2 * num_programs, dtype=torch.int32, device=device),
        torch.empty((3 if filtered else 1) * shape.vocab_size, device=device),
    ]
