"""Settings of scripts/diagnose.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from neurogen.brain import BrainConfig
from neurogen.diagnosis.measure import TASKS
from neurogen.errors import UserError
from neurogen.modes import MODES

SIZES = {
    "nano": BrainConfig(),
    "small": BrainConfig(embedding_dim=512, hippocampus_depth=2, pfc_depth=2),
    "base": BrainConfig(embedding_dim=1536, column_width=128, head_width=128, hippocampus_depth=2, pfc_depth=2),
}
SUBJECTS = ("modes", "tokenization", "activity")
PRECISIONS = ("fp32", "bf16")


@dataclass
class Options:
    """One run of the diagnosis; checked when made.

    what: `modes`, `tokenization` or `activity`.
    model: a size, `nano`, `small` or `base`.
    mode: `all`, or one or several names with commas between them.
    task: `all`, `train` or `generate`.
    sequence: T, tokens a lane.
    lanes: B.
    vocab_size: V.
    counted_tokens: at most so many tokens are counted, since counting is slow.
    device: `auto`, or what torch calls it.
    precision: `fp32`, or `bf16` for torch.autocast.
    text: a file to read, for activity; a module of Python's library if empty.
    out: the folder for the JSON file and the plot; `runs/diagnosis` if empty.
    seed: of weights and ids.
    """

    what: str = "modes"
    model: str = "nano"
    mode: str = "all"
    task: str = "all"
    sequence: int = 500
    lanes: int = 1
    vocab_size: int = 257
    counted_tokens: int = 64
    device: str = "auto"
    precision: str = "fp32"
    text: str = ""
    out: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for key, choices in (("what", SUBJECTS), ("model", tuple(SIZES)), ("precision", PRECISIONS)):
            _one_of(key, getattr(self, key), choices)
        _one_of("task", self.task, ("all", *TASKS))
        if self.mode != "all":
            for name in self.mode.split(","):
                _one_of("mode", name, ("all", *MODES))
        for key, least in (("sequence", 2), ("lanes", 1), ("vocab_size", 2), ("counted_tokens", 2)):
            if getattr(self, key) < least:
                raise UserError(f"{key} is {getattr(self, key)}; it must be at least {least}")

    @property
    def tasks(self) -> tuple[str, ...]:
        return TASKS if self.task == "all" else (self.task,)

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.mode == "all" else tuple(self.mode.split(","))

    def torch_device(self) -> torch.device:
        """Raises UserError for a device torch does not know or this machine does not have."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise UserError(f"device is {self.device!r}; use auto, cpu or cuda") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device is {self.device}, and this machine has no CUDA GPU; use device=cpu")
        return device


def parse_options(words: Sequence[str]) -> Options:
    """`key=value` words to options. Raises UserError, one line, for an unknown key or a value of the wrong type."""
    for word in words:
        key, equals, _ = word.partition("=")
        known = [field.name for field in dataclasses.fields(Options)]
        if not equals or key not in known:
            raise UserError(f"cannot use {word!r}; settings are key=value with one of {', '.join(known)}")
    try:
        node = OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_cli(list(words)))
        options = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(options, Options)
    return options


def _one_of(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{key} is {value!r}; choose one of {', '.join(choices)}")
