"""The machine a diagnosis ran on, and what it cannot measure."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from neurogen.diagnosis.usage import gpu_use_reader
from neurogen.machine import machine_facts


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Names, versions and commit, for the result file."""
    return machine_facts(device) | {
        "device_type": device.type,
        "cpu_cores": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def missing_instruments(device: torch.device) -> list[str]:
    """What is not in the tables on this machine, and why, a sentence each."""
    if device.type != "cuda":
        return [
            "no CUDA GPU: no GPU use, GPU memory, device allocations or kernel launches; operations are counted in "
            "their place, and synchronisations are the places where the host would wait for one"
        ]
    if gpu_use_reader(device) is None:
        return ["nvidia-ml-py is not installed or the driver does not tell: no GPU use (pip install nvidia-ml-py)"]
    return []
