"""Modes by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from kernels.decode import DecodeOutput
from kernels.sample import SampleOutput, Sampling
from neurogen.brain import Brain, BrainOutput, BrainState, Decoder, TokenEmbedding
from neurogen.errors import UserError
from neurogen.modes.fused import FusedMode
from neurogen.modes.naive import NaiveMode
from neurogen.modes.pointer import PointerMode
from neurogen.modes.preallocated import PreallocatedMode
from neurogen.modes.unfused import UnfusedMode

if TYPE_CHECKING:
    from neurogen.generation import Generation, Request
    from neurogen.model import NeuroGen


class Mode(Protocol):
    """A way to run a sequence; every mode gives the same outputs, gradients and tokens.

    What each does with the host, a sequence of T tokens, is in its own docstring.
    """

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

    def loss(self, decoder: Decoder, broca_output: Tensor, target_ids: Tensor) -> DecodeOutput:
        """Loss and accuracy of `[B, T, D]` against targets `[B, T]`; see `Decoder.loss`."""
        ...

    def draw(
        self,
        decoder: Decoder,
        broca_output: Tensor,
        sampling: Sampling,
        *,
        seed: int,
        lanes: Tensor,
        positions: Tensor,
        seen: Tensor | None,
    ) -> SampleOutput:
        """A token for each lane of `[B, D]`; see `Decoder.decode_and_sample`."""
        ...

    def generate(self, model: NeuroGen, request: Request) -> Generation:
        """Continue the request's prompts."""
        ...


_BY_NAME: dict[str, type[Mode]] = {
    mode.name: mode for mode in (NaiveMode, PointerMode, PreallocatedMode, UnfusedMode, FusedMode)
}


MODES = tuple(_BY_NAME)
TOKEN_BY_TOKEN = tuple(mode.name for mode in (NaiveMode, PointerMode, PreallocatedMode))


def resolve_mode(name: str) -> str:
    """The mode a name stands for; `auto` is fused where there is a CUDA GPU, and unfused elsewhere.

    Raises:
        UserError: the name is unknown.
    """
    if name == "auto":
        return "fused" if torch.cuda.is_available() else "unfused"
    if name not in MODES:
        raise UserError(f"mode is {name!r}; choose one of auto, {', '.join(MODES)}")
    return name


def check_dropout_runs(name: str, dropout: float) -> None:
    """Raise UserError if the mode cannot train with dropout: the ones that go token by token cannot."""
    if dropout and name in TOKEN_BY_TOKEN:
        raise UserError(
            f"model.dropout is {dropout}, and mode={name} trains without; use mode=fused or mode=unfused, or set it "
            "to 0"
        )


def make_mode(name: str) -> Mode:
    """The mode called `name`; raises UserError as `resolve_mode` does."""
    return _BY_NAME[resolve_mode(name)]()
