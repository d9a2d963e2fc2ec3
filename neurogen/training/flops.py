"""Model FLOPs utilisation, and the peak memory of a process."""

from __future__ import annotations

import sys

import torch

# Dense bfloat16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets (without sparsity). The longest name that fits
# counts.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bfloat16 FLOP/s of a GPU by the name CUDA gives it, None if unknown."""
    words = device_name.split()
    fits = [name for name in PEAK_BF16_FLOPS if _contains(words, name.split())]
    return PEAK_BF16_FLOPS[max(fits, key=len)] if fits else None


def _contains(words: list[str], wanted: list[str]) -> bool:
    # Whole words, save that memory sizes and form factors are hyphenated on: "A100-SXM4-80GB" is an A100.
    plain = [part for word in words for part in (word, word.split("-")[0])]
    return all(word in plain for word in wanted)


def model_flops_utilization(tokens_per_second: float, flops_per_token: float, device: torch.device) -> float | None:
    """The share of the device's peak that the model's own FLOPs make up; None where no peak is known.

    Counts what the model needs (Chowdhery et al., 2022, appendix B), not what an implementation recomputes.
    """
    if device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return None if peak is None else tokens_per_second * flops_per_token / peak


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: allocated by torch on a GPU, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no such count
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
