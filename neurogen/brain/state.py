"""The brain's state as data: saved, loaded, batched, split and reset lane by lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cortex import CortexState
from kernels.relay import NO_TOKEN
from neurogen.errors import UserError
from neurogen.storage.sealed_tensors import load_sealed, save_sealed

FORMAT = "neurogen-state-2"


class MemoryState(NamedTuple):
    """Fast weights of one memory layer, `[B, H, N, N]`, key channel then value channel."""

    fast_weight: Tensor


class ShiftedMemoryState(NamedTuple):
    """A memory layer's state where `token_shift` is on: fast weights, and the last rows it read, `[B, k-1, D]`."""

    fast_weight: Tensor
    recent: Tensor


class LSTMState(NamedTuple):
    """What the LSTM we compare with carries, `[B, L, D]` each."""

    hidden: Tensor
    cell: Tensor


LayerState = CortexState | MemoryState | ShiftedMemoryState | LSTMState
_KINDS: tuple[type[LayerState], ...] = (CortexState, MemoryState, ShiftedMemoryState, LSTMState)


@dataclass(frozen=True)
class BrainState:
    """What a brain carries from one token to the next, for B lanes.

    Arguments:
        position: `[B]` int64, tokens read since the lane began (document starts do not set it back: it numbers draws).
        recent_ids: `[B, 3]` int64, the last ids of the current document, oldest first, -1 where there is none.
        layers: state of each stateful layer by its name, such as `wernicke.0`, in the order of the workspace.

    Its size does not depend on how many tokens were read.
    """

    position: Tensor
    recent_ids: Tensor
    layers: dict[str, LayerState] = field(default_factory=dict)

    @property
    def lanes(self) -> int:
        return self.position.shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a flat name such as `wernicke.0.voltage`; lanes are the first dimension of each."""
        flat = {"position": self.position, "recent_ids": self.recent_ids}
        for name, layer in self.layers.items():
            flat |= {f"{name}.{part}": tensor for part, tensor in layer._asdict().items()}
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> BrainState:
        """The inverse of `tensors`. Raises UserError for names that are not a state's or lane counts that differ."""
        flat = dict(flat)
        missing = [name for name in ("position", "recent_ids") if name not in flat]
        if missing:
            raise UserError(f"this is not a brain state: it has no tensor {missing[0]!r}")
        position, recent_ids = flat.pop("position"), flat.pop("recent_ids")
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in flat.items():
            layer, _, part = name.rpartition(".")
            parts.setdefault(layer, {})[part] = tensor
        layers: dict[str, LayerState] = {}
        for layer, named in parts.items():
            kinds = [kind for kind in _KINDS if set(kind._fields) == set(named)]
            if not kinds:
                raise UserError(f"layer {layer!r} of the state has parts {sorted(named)}, which no kind of layer has")
            layers[layer] = kinds[0](**named)
        state = cls(position, recent_ids, layers)
        for name, tensor in state.tensors().items():
            if tensor.dim() == 0 or tensor.shape[0] != state.lanes:
                raise UserError(
                    f"tensor {name!r} of the state has shape {tuple(tensor.shape)}, not {state.lanes} lanes"
                )
        return state

    def map(self, function: Callable[[Tensor], Tensor]) -> BrainState:
        """The state with `function` applied to every tensor."""
        return BrainState.from_tensors({name: function(tensor) for name, tensor in self.tensors().items()})

    def detach(self) -> BrainState:
        """The same values without their history: where back-propagation through time is cut."""
        return self.map(torch.Tensor.detach)

    def clone(self) -> BrainState:
        return self.map(torch.Tensor.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BrainState:
        """The state on a device; `dtype` applies to the real-valued tensors alone."""
        return self.map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def reset(self, lanes: Tensor | Sequence[int]) -> BrainState:
        """The state with the chosen lanes as new.

        Arguments:
            lanes: indices, or a `[B]` bool mask.
        """
        chosen = torch.as_tensor(lanes, device=self.position.device)
        if chosen.dtype == torch.bool:
            if chosen.shape != (self.lanes,):
                raise UserError(f"a mask of {tuple(chosen.shape)} lanes cannot reset a state of {self.lanes} lanes")
            chosen = chosen.nonzero()[:, 0]
        chosen = self._checked(chosen.to(torch.int64))
        fresh = self.map(lambda x: x.index_fill(0, chosen, 0))
        return BrainState(fresh.position, self.recent_ids.index_fill(0, chosen, NO_TOKEN), fresh.layers)

    def select(self, lanes: Tensor | Sequence[int]) -> BrainState:
        """The state of the chosen lanes, in the order given; a lane may be chosen more than once."""
        chosen = torch.as_tensor(lanes, dtype=torch.int64, device=self.position.device)
        chosen = self._checked(chosen)
        return self.map(lambda x: x.index_select(0, chosen))

    def split(self) -> list[BrainState]:
        """One state a lane."""
        return [self.select([lane]) for lane in range(self.lanes)]

    @staticmethod
    def cat(states: Sequence[BrainState]) -> BrainState:
        """The lanes of several states side by side."""
        if not states:
            raise UserError("no states to concatenate; give at least one")
        flats = [state.tensors() for state in states]
        if any(flat.keys() != flats[0].keys() for flat in flats):
            raise UserError("the states to concatenate are of brains with different layers")
        return BrainState.from_tensors({name: torch.cat([flat[name] for flat in flats]) for name in flats[0]})

    def save(self, path: str | Path) -> None:
        """Write the state as a safetensors file, whole or not at all. Raises OSError when the file system refuses."""
        save_sealed(Path(path), self.tensors(), file_format=FORMAT)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> BrainState:
        """Read a file written by `save`. Raises UserError if there is none or it is damaged or something else."""
        return cls.from_tensors(load_sealed(Path(path), file_format=FORMAT, noun="brain state", device=device))

    def check_fits(self, other: BrainState) -> None:
        """Raise UserError unless both states have the same layers, lanes and shapes."""
        mine, theirs = self.tensors(), other.tensors()
        if mine.keys() != theirs.keys():
            unlike = sorted(mine.keys() ^ theirs.keys())[0]
            raise UserError(f"the state is of a brain with other layers ({unlike!r} is in one alone)")
        for name, tensor in mine.items():
            if tensor.shape != theirs[name].shape:
                raise UserError(
                    f"the state's {name!r} has shape {tuple(tensor.shape)} where this brain and batch need "
                    f"{tuple(theirs[name].shape)}"
                )

    def _checked(self, lanes: Tensor) -> Tensor:
        if lanes.numel() and (int(lanes.min()) < 0 or int(lanes.max()) >= self.lanes):
            raise UserError(f"lanes {lanes.tolist()} are not all in 0..{self.lanes - 1}")
        return lanes
