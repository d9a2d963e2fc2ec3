"""A model and its state in the flat form the generating launch reads, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.cortex import CortexState
from kernels.generate import BrainShape, PackedBrain, PackedState
from kernels.generate.quantized import quantize_rows
from neurogen.brain import BrainConfig, BrainState, MemoryState
from neurogen.brain.config import NUM_TAPS
from neurogen.brain.regions import CortexLayer, MemoryLayer
from neurogen.brain.state import LayerState

if TYPE_CHECKING:
    from neurogen.model import NeuroGen


def brain_shape(config: BrainConfig, vocab_size: int) -> BrainShape:
    """The launch's view of a config."""
    return BrainShape(
        width=config.embedding_dim,
        column_width=config.column_width,
        head_width=config.head_width,
        mlp_width=config.mlp_width,
        vocab_size=vocab_size,
        num_wernicke=config.wernicke_depth,
        num_memory=config.hippocampus_depth + config.pfc_depth,
        num_broca=config.broca_depth,
        num_taps=NUM_TAPS,
        spike_kind=config.spike,
        rule=config.memory_rule,
        go_gate=config.go_gate and config.broca_depth > 0,
        threshold=config.threshold,
        adaptation_strength=config.adaptation_strength,
        adaptation_decay=config.adaptation_decay,
        eps=config.norm_eps,
    )


def pack_brain(model: NeuroGen, dtype: torch.dtype | None = None, weights: str | None = None) -> PackedBrain:
    """A copy of the model's weights for the launch: the embedding, and without `weights` the matrices too, in `dtype`
    (the model's own if None); with `weights="int8"` matrices rounded to int8, a scale a row."""
    dtype = dtype or model.embedding.weight.dtype
    shape = brain_shape(model.config, model.vocab_size)
    matrices, vectors = [], []
    for layer in model.brain.layers().values():
        assert isinstance(layer, CortexLayer | MemoryLayer)
        projections = (layer.in_proj, layer.out_proj, layer.mlp.in_proj, layer.mlp.out_proj)
        matrices += [projection.weight.detach() for projection in projections]
        vectors.append(_layer_vectors(layer))
    if model.brain.basal_ganglia is not None:
        go = model.brain.basal_ganglia.go
        vectors.append(_padded([go.weight, go.bias]))
    vectors.append(_padded([model.brain.thalamus.taps]))
    embedding, decoder = model.embedding.weight.detach(), model.decoder.weight.detach()
    scales = None
    if weights == "int8":
        rounded = [quantize_rows(matrix) for matrix in (*matrices, decoder)]
        scales = torch.cat([scale for _, scale in rounded])
        *matrices, decoder = (matrix for matrix, _ in rounded)
    of_matrices = torch.int8 if weights == "int8" else dtype
    empty = embedding.new_zeros(0, dtype=of_matrices)
    return PackedBrain(
        shape,
        embedding.to(dtype).contiguous(),
        decoder.to(of_matrices).contiguous(),
        torch.cat([empty, *(matrix.to(of_matrices).flatten() for matrix in matrices)]),
        torch.cat(vectors),
        scales,
    )


# By model: what its weights were at its last reply, and the copy that was made of them.
_packed: WeakKeyDictionary[NeuroGen, tuple[object, PackedBrain | None]] = WeakKeyDictionary()


def packed_brain(model: NeuroGen, dtype: torch.dtype | None = None, weights: str | None = None) -> PackedBrain:
    """As `pack_brain`, which is spared when the weights have not changed since the last two replies.

    A copy is kept from the second reply on, so that a training run that draws a sample now and then holds none, and
    only as long as its model lives. A change is seen by the weights' version counters; another `dtype` or `weights` is
    one too.
    """
    now = _weights_now(model, dtype, weights)
    if now is None:
        return pack_brain(model, dtype, weights)
    before, brain = _packed.get(model, (None, None))
    if now != before or brain is None:
        brain = None  # the old copy goes before the new one comes
        _packed[model] = (now, None)
        brain = pack_brain(model, dtype, weights)
        if now == before:
            _packed[model] = (now, brain)
    return brain


def _weights_now(model: NeuroGen, dtype: torch.dtype | None, weights: str | None) -> object | None:
    """What changes whenever a weight does, or what is asked for; None where nothing does (tensors of inference mode
    count no versions)."""
    # `model.parameters()` and `model.buffers()` take four times as long, at each reply.
    tensors = [
        tensor
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return dtype, weights, [(tensor.data_ptr(), tensor.dtype, tensor.device, tensor._version) for tensor in tensors]


def _layer_vectors(layer: CortexLayer | MemoryLayer) -> Tensor:
    if isinstance(layer, CortexLayer):
        return _padded([layer.lateral_weight, torch.sigmoid(layer.decay_logit.float()), layer.drive_bias])
    gates = [layer.forget] if layer.write is None else [layer.forget, layer.write]
    return _padded([tensor for gate in gates for tensor in (gate.weight, gate.bias)])


def _padded(tensors: list[Tensor]) -> Tensor:
    """Flat float32, with zeros up to a multiple of 64 elements."""
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    return torch.nn.functional.pad(flat, (0, -len(flat) % 64))


def pack_state(model: NeuroGen, state: BrainState) -> PackedState:
    """A state's tensors stacked by kind, float32."""
    config, lanes, device = model.config, state.lanes, state.position.device
    cortex = [torch.stack(layer) for layer in state.layers.values() if isinstance(layer, CortexState)]
    fast = [layer.fast_weight for layer in state.layers.values() if isinstance(layer, MemoryState)]
    no_cortex = torch.zeros(0, 3, lanes, config.embedding_dim, device=device)
    no_fast = torch.zeros(0, lanes, config.num_heads, config.head_width, config.head_width, device=device)
    return PackedState(
        state.position,
        state.recent_ids,
        torch.stack(cortex).float() if cortex else no_cortex,
        torch.stack(fast).float() if fast else no_fast,
    )


def unpack_state(packed: PackedState, like: BrainState) -> BrainState:
    """The inverse of `pack_state` for a state with the layers of `like`."""
    cortex, fast = iter(packed.cortex), iter(packed.fast_weight)
    layers: dict[str, LayerState] = {
        name: CortexState(*next(cortex)) if isinstance(layer, CortexState) else MemoryState(next(fast))
        for name, layer in like.layers.items()
    }
    return BrainState(packed.position, packed.recent_ids, layers)
