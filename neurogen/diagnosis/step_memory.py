"""What a fused train step has to keep on the device, counted from the brain's sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.memory.launch_table import launch_table
from neurogen.brain import BrainConfig
from neurogen.model import NeuroGen

_FULL = torch.float32.itemsize
_ADAMW_MOMENTS = 2


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one device's train step with AdamW; docs/ARCHITECTURE.md has the table of what `activations` counts."""

    parameters: int
    gradients: int
    optimizer: int
    rounded_weights: int  # copies in the type that products run in
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.rounded_weights + self.activations


def fused_step_memory(model: NeuroGen, *, lanes: int, num_tokens: int, dtype: torch.dtype) -> StepMemory:
    """Count the bytes of a step over `[lanes, num_tokens]` ids with activations of `dtype`, float32 or half precision.

    Counted is what lives from forward to backward: neither the gradients of activations that come and go in backward
    nor the workspace passed from layer to layer, of which there is one at a time.
    """
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_rounded = sum(p.numel() for name, p in model.named_parameters() if _is_rounded(name, p, model.config))
    return StepMemory(
        parameters=_FULL * num_parameters,
        gradients=_FULL * num_parameters,
        optimizer=_ADAMW_MOMENTS * _FULL * num_parameters,
        rounded_weights=0 if dtype == torch.float32 else dtype.itemsize * num_rounded,
        activations=lanes * num_tokens * _bytes_per_token(model, dtype),
    )


def _is_rounded(name: str, parameter: torch.Tensor, config: BrainConfig) -> bool:
    """Whether products read it in their own type: not the relay's table and taps, and not the Go gate's."""
    if name.startswith("embedding"):
        return config.tie_embedding
    return parameter.ndim == 2 and not name.endswith("taps") and "basal_ganglia" not in name


def _bytes_per_token(model: NeuroGen, dtype: torch.dtype) -> int:
    config, size = model.config, dtype.itemsize
    width, num_heads, depths = config.embedding_dim, config.num_heads, config.depths
    norm = size * width + _FULL  # normed rows, which their reader keeps too, and one over their root mean square
    mlp = norm + size * 3 * config.mlp_width  # both halves of SwiGLU's input, and the hidden row
    cortex = norm + size * 5 * width + mlp  # drive and gate, spikes, excess voltage, activity
    memory = norm + size * 6 * width + _FULL * num_heads + mlp  # q, k, v and gate, read, activity; forget logits
    if config.memory_rule == "delta":
        table = launch_table(dtype, config.head_width, delta=True, large_shared=True)
        memory += _FULL * num_heads + size * num_heads * table.length  # write logits, triangular inverses
    num_cortex = depths["wernicke"] + depths["broca"]
    num_memory = depths["hippocampus"] + depths["pfc"]
    gates = _FULL * config.num_columns if config.go_gate and depths["broca"] else 0
    decode = norm + size * width  # the gradient of the decoder's input, made with the loss
    # One byte a number that may be left out: by the relay, and twice a layer. A sequence's own mask counts for nothing.
    masks = width * (1 + 2 * sum(depths.values())) if config.dropout and config.dropout_mask == "token" else 0
    return num_cortex * cortex + num_memory * memory + gates + decode + masks
