"""Where figures come from: the device, the versions of what they depend on, and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = (
    "torch",
    "triton",
    "flash-linear-attention",
    "liger-kernel",
    "cut-cross-entropy",
    "flashrnn",
    "spikingjelly",
)


def machine_facts(device: torch.device | None = None) -> dict[str, str]:
    """Device, versions and commit, as every result carries them; `device` is the GPU, where there is one, by default.

    The environment's NEUROGEN_COMMIT names the commit where the code runs from a copy without its history.
    """
    facts = {"python": platform.python_version(), "device": platform.processor() or platform.machine()}
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        facts["device"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = os.environ.get("NEUROGEN_COMMIT")
    if commit is None:
        root = os.path.dirname(os.path.abspath(__file__))
        command = ["git", "-C", root, "rev-parse", "--short=12", "HEAD"]
        try:
            commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            commit = ""  # no git
    return facts | {"commit": commit or "unknown"}
