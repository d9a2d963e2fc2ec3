"""Small brains whose every part matters, for the tests of generation."""

from __future__ import annotations

import torch

from neurogen import BrainConfig, NeuroGen

VOCAB_SIZE = 41


def small_brain(seed: int = 0, *, vocab_size: int = VOCAB_SIZE, mode: str = "unfused", **changes: object) -> NeuroGen:
    """A brain of width 32 with nothing at zero: a new one is the identity, which would hide most mistakes."""
    sizes: dict[str, object] = {"embedding_dim": 32, "column_width": 16, "head_width": 16}
    torch.manual_seed(seed)
    model = NeuroGen(BrainConfig(**{**sizes, **changes}), vocab_size=vocab_size, mode=mode)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("out_proj.weight") or name == "decoder.weight":
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            elif any(part in name for part in ("forget.weight", "go.weight", "taps", "write.bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_prompts(lengths: list[int], seed: int = 1, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
