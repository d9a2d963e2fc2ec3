"""A whole brain generating token by token from packed weights, in plain torch: the definition of the launch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cortex import CortexState
from kernels.cortex.reference import cortex_reference
from kernels.gated_norm.reference import gated_norm_reference
from kernels.generate.layout import BrainShape, GenerateOutput, PackedBrain, PackedState
from kernels.generate.quantized import dequantized
from kernels.memory.reference import memory_reference
from kernels.precision import rms_normalize
from kernels.relay.reference import relay_reference
from kernels.sample.reference import Sampling, sample_reference


def generate_reference(
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
    """Read one token a lane, draw the next, and so on, until N tokens are drawn or every lane has met a stop token.

    Arguments:
        brain: weights; int8 ones count as what their scales make of them, in float32.
        state: of B lanes, before `token_ids`; left as it is.
        token_ids: `[B]` int64, the first token each lane reads.
        sampling: how tokens are drawn.
        max_new_tokens: N >= 1.
        seed: of the draws, modulo 2^64.
        lanes: `[B]` int64, the number of each lane in its draws.
        stop_ids: `[S]` int64; a lane that draws one ends: it repeats that token and its state stays as it is.
        seen: `[B, V]` bool, tokens a repetition penalty applies to besides those drawn.

    Returns:
        GenerateOutput.
    """
    brain = dequantized(brain)
    position, recent_ids, cortex, fast_weight = (tensor.clone() for tensor in state)
    seen = None if seen is None else seen.clone()
    lengths = torch.zeros_like(token_ids)
    done = torch.zeros_like(token_ids, dtype=torch.bool)
    tokens, log_probs = [], []
    for _ in range(max_new_tokens):
        new = _read(brain, PackedState(position, recent_ids, cortex, fast_weight), token_ids)
        hidden, position, recent_ids, cortex, fast_weight = (
            torch.where(done.view(shape), old, fresh)
            for shape, old, fresh in (
                ((-1, 1), new[0], new[0]),
                ((-1,), position, new[1].position),
                ((-1, 1), recent_ids, new[1].recent_ids),
                ((1, 1, -1, 1), cortex, new[1].cortex),
                ((1, -1, 1, 1, 1), fast_weight, new[1].fast_weight),
            )
        )
        drawn = sample_reference(hidden, brain.decoder, sampling, seed=seed, lanes=lanes, positions=position, seen=seen)
        token_ids = torch.where(done, token_ids, drawn.tokens)
        tokens.append(token_ids)
        log_probs.append(drawn.log_probs.masked_fill(done, 0.0))
        lengths = lengths + ~done
        if seen is not None:
            seen.scatter_(1, token_ids[:, None], True)
        done = done | torch.isin(token_ids, stop_ids)
        if bool(done.all()):
            break
    num_missing = max_new_tokens - len(tokens)
    tokens += [token_ids] * num_missing
    log_probs += [torch.zeros_like(log_probs[0])] * num_missing
    final = PackedState(position, recent_ids, cortex, fast_weight)
    return GenerateOutput(torch.stack(tokens, 1), torch.stack(log_probs, 1), lengths, final)


def _read(brain: PackedBrain, state: PackedState, token_ids: Tensor) -> tuple[Tensor, PackedState]:
    """One token a lane: what the decoder sees, rms(x) `[B, D]`, and the next state."""
    shape, width = brain.shape, brain.shape.width
    matrices, vectors = _Cursor(brain.matrices), _Cursor(brain.vectors)
    tail = _Cursor(brain.vectors[shape.go_offset :])
    if shape.go_gate:
        go_weight, go_bias = tail.take(shape.num_columns, width), tail.take(shape.num_columns)
    taps = brain.vectors[shape.taps_offset :][: shape.num_taps * width].view(shape.num_taps, width)
    x, recent_ids = relay_reference(token_ids[:, None], brain.embedding, taps, state.recent_ids, eps=shape.eps)
    x = x.float()
    cortex: list[Tensor] = []
    fast_weight: list[Tensor] = []
    go = None
    for kind in _kinds(shape):
        h = rms_normalize(x, shape.eps)
        if kind == "memory":
            y, new = _memory_circuit(shape, h, matrices, vectors, state.fast_weight[len(fast_weight)])
            fast_weight.append(new)
        else:
            if kind == "broca" and shape.go_gate and go is None:
                go = torch.sigmoid(F.linear(h, go_weight, go_bias))
            y, new = _cortex_circuit(shape, h, matrices, vectors, state.cortex[len(cortex)])
            cortex.append(new)
            if kind == "broca" and go is not None:
                y = (y.unflatten(-1, (shape.num_columns, -1)) * go.unsqueeze(-1)).flatten(-2)
        x = x + _linear(y, matrices.take(width, width))
        gate, value = _linear(rms_normalize(x, shape.eps), matrices.take(2 * shape.mlp_width, width)).chunk(2, -1)
        x = x + _linear(F.silu(gate) * value, matrices.take(width, shape.mlp_width))
    new_state = PackedState(
        state.position + 1,
        recent_ids,
        torch.stack(cortex) if cortex else state.cortex,
        torch.stack(fast_weight) if fast_weight else state.fast_weight,
    )
    return rms_normalize(x[:, 0], shape.eps).to(brain.decoder.dtype), new_state


class _Cursor:
    """Takes blocks off a flat buffer in turn."""

    def __init__(self, flat: Tensor) -> None:
        self._flat, self._at = flat, 0

    def take(self, *shape: int) -> Tensor:
        block = self._flat[self._at :][: torch.Size(shape).numel()].view(shape)
        self._at += block.numel()
        return block

    def align(self) -> None:
        self._at += -self._at % 64


def _kinds(shape: BrainShape) -> Iterator[str]:
    yield from ["wernicke"] * shape.num_wernicke
    yield from ["memory"] * shape.num_memory
    yield from ["broca"] * shape.num_broca


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight).float()


def _cortex_circuit(
    shape: BrainShape, h: Tensor, matrices: _Cursor, vectors: _Cursor, state: Tensor
) -> tuple[Tensor, Tensor]:
    width, column = shape.width, shape.column_width
    drive, gate = _linear(h, matrices.take(2 * width, width)).chunk(2, -1)
    lateral, decay, bias = vectors.take(shape.num_columns, column, column), vectors.take(width), vectors.take(width)
    vectors.align()
    out = cortex_reference(
        drive + bias,
        lateral,
        decay,
        CortexState(*state),
        spike_kind=shape.spike_kind,
        threshold=shape.threshold,
        adaptation_strength=shape.adaptation_strength,
        adaptation_decay=shape.adaptation_decay,
    )
    return gated_norm_reference(out.spikes, gate, group_size=column, eps=shape.eps), torch.stack(out.state)


def _memory_circuit(
    shape: BrainShape, h: Tensor, matrices: _Cursor, vectors: _Cursor, state: Tensor
) -> tuple[Tensor, Tensor]:
    width, heads = shape.width, shape.num_heads
    query, key, value, gate = _linear(h, matrices.take(4 * width, width)).chunk(4, -1)
    query, key, value = (z.unflatten(-1, (heads, -1)) for z in (query, key, value))
    forget = F.linear(h, vectors.take(heads, width), vectors.take(heads))
    write = F.linear(h, vectors.take(heads, width), vectors.take(heads)) if shape.rule == "delta" else None
    vectors.align()
    read, new = memory_reference(query, key, value, forget, write, state, rule=shape.rule, chunk_size=1, eps=shape.eps)
    return gated_norm_reference(read.flatten(-2), gate, group_size=shape.head_width, eps=shape.eps), new
