"""Modes by name."""

from typing import Protocol

from torch import Tensor

from neurogen.brain import Brain, BrainOutput, BrainState, TokenEmbedding
from neurogen.errors import UserError
from neurogen.modes.unfused import UnfusedMode

MODES = ("naive", "pointer", "preallocated", "unfused", "fused")
_BUILT = {"unfused": UnfusedMode}


class Mode(Protocol):
    """A way to run a sequence; every mode gives the same outputs, gradients and tokens."""

    name: str
    backend: str

    def sequence(
        self,
        brain: Brain,
        embedding: TokenEmbedding,
        input_ids: Tensor,
        state: BrainState,
        document_start: Tensor | None,
    ) -> BrainOutput:
        """Run `input_ids` `[B, T]` from `state`; see `Brain.forward`."""
        ...


def resolve_mode(name: str) -> str:
    """The mode a name stands for; `auto` is the fastest one there is.

    Raises:
        UserError: the name is unknown, or that mode is not built yet.
    """
    if name == "auto":
        return "unfused"
    if name not in MODES:
        raise UserError(f"mode is {name!r}; choose one of auto, {', '.join(MODES)}")
    if name not in _BUILT:
        raise UserError(f"mode={name} is not built yet; use mode={' or mode='.join(_BUILT)}")
    return name


def make_mode(name: str) -> Mode:
    """The mode called `name`; raises UserError as `resolve_mode` does."""
    return _BUILT[resolve_mode(name)]()
