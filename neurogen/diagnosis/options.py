"""Settings of scripts/diagnose.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from neurogen.brain import BrainConfig
from neurogen.diagnosis.measure import TASKS
from neurogen.errors import UserError
from neurogen.modes import MODES

SUBJECTS = ("modes", "tokenization", "activity", "health")
PRECISIONS = ("fp32", "bf16")
VERBATIM = ("mode", "checkpoint", "text", "out")  # keys whose value is taken as it stands


LEAST = {"sequence": 2, "lanes": 1, "vocab_size": 2, "counted_tokens": 2, "clocked_tokens": 0}


@dataclass
class Options:
    """One run of the diagnosis; checked when made.

    what: `modes`, `tokenization`, `activity` or `health`.
    model: sizes and rules of a new model, and model_name: what tables and files call it.
    checkpoint: a trained model to watch instead, with its own tokenizer; for activity, and needed for health.
    mode: `all`, or one or several names with commas between them; for tokenization, the one to train in, the trainer's
        own choice if `all`.
    task: `all`, `train` or `generate`.
    sequence: T, tokens a lane.
    lanes: B.
    vocab_size: V.
    counted_tokens: at most so many tokens are counted, since counting is slow.
    clocked_tokens: at most so many tokens are clocked by stage in modes that go token by token; 0 for all.
    device: `auto`, or what torch calls it.
    precision: `fp32`, or `bf16` for torch.autocast.
    text: a file to read, for activity; a module of Python's library if empty.
    out: the folder for the JSON file and the plot; `runs/diagnosis` if empty.
    seed: of weights and ids.
    """

    what: str = "modes"
    model: BrainConfig = field(default_factory=BrainConfig)
    model_name: str = "nano"
    checkpoint: str | None = None
    mode: str = "all"
    task: str = "all"
    sequence: int = 500
    lanes: int = 1
    vocab_size: int = 257
    counted_tokens: int = 64
    clocked_tokens: int = 0
    device: str = "auto"
    precision: str = "fp32"
    text: str = ""
    out: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for key, choices in (("what", SUBJECTS), ("precision", PRECISIONS)):
            _one_of(key, getattr(self, key), choices)
        _one_of("task", self.task, ("all", *TASKS))
        if not isinstance(self.model, BrainConfig):
            raise UserError(f"model={self.model_name}: modes are a brain's; choose one of base, nano, small")
        if self.mode != "all":
            for name in self.mode.split(","):
                _one_of("mode", name, ("all", *MODES))
        for key, least in LEAST.items():
            if getattr(self, key) < least:
                raise UserError(f"{key} is {getattr(self, key)}; it must be at least {least}")

        if self.checkpoint is not None and self.what not in ("activity", "health"):
            raise UserError(f"what is {self.what!r}; a checkpoint is for what=activity and what=health")
        if self.checkpoint is None and self.what == "health":
            raise UserError("what=health: needs a checkpoint; a new model remembers nothing yet")

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


@dataclass
class ReportOptions:
    """Settings of scripts/report_modes.py: `result`, a file of scripts/diagnose.py, the `task` to report, and `into`, a
    document with a place for the table; printed if empty."""

    result: str
    task: str = "train"
    into: str = ""

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)


def name_model(node: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The composed tree with the name of the chosen model size, or of the checkpoint, for tables and file names."""
    if node.model_name is None:
        node.model_name = "checkpoint" if node.checkpoint is not None else HydraConfig.get().runtime.choices["model"]
    return node


def _one_of(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{key} is {value!r}; choose one of {', '.join(choices)}")
