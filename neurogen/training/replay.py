"""A step that went wrong, kept whole and run again under a watch that names the first operation to blame.

A bundle is a checkpoint of the moment before the step (parameters, optimiser, random generators) whose state file also
holds the batch and the brain state that the step read.
"""

from __future__ import annotations

import dataclasses
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neurogen.brain import BrainState
from neurogen.data import Batch
from neurogen.errors import UserError
from neurogen.training.checkpoint import load_checkpoint
from neurogen.training.rng import encode_torch_rng, restore_rng
from neurogen.training.trained import load_trained

if TYPE_CHECKING:
    from neurogen.config.schema import ModeConfig
    from neurogen.training.session import Session

BATCH, BRAIN = "batch/", "brain/"
PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = (PROJECT / "neurogen", PROJECT / "kernels")
# What every projection goes through: its caller says more.
PASSED_THROUGH = (Path(__file__), PROJECT / "kernels" / "linear" / "reference.py")


@dataclass(frozen=True)
class Finding:
    """The first operation that made something non-finite out of finite numbers.

    Arguments:
        op: its full name, such as aten.mm.default.
        module: path of the innermost module that was running, "" outside all; in the backward pass, the module whose
            forward pass made the operation.
        phase: forward or backward.
        shape, num_nan, num_inf: of its output.
        largest: magnitude of the largest finite input.
        line: innermost line of this project, for the forward pass.
    """

    op: str
    module: str
    phase: str
    shape: tuple[int, ...]
    num_nan: int
    num_inf: int
    largest: float
    line: str

    def __str__(self) -> str:
        where = f"module {self.module}" if self.module else "no module of its own"
        return (
            f"{self.op} in {where} ({self.phase} pass{', ' + self.line if self.line else ''}): output "
            f"{list(self.shape)} has {self.num_nan} nan and {self.num_inf} inf; largest input {self.largest:.4g}"
        )


class NonFiniteWatch(TorchDispatchMode):
    """Looks at every operation inside the context; `finding` is the first that is to blame, or None.

    Operations that introduce an infinity on purpose (a constant, a fill) or leave memory uninitialised are not.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.finding: Finding | None = None
        self._model = model
        self._running: list[str] = []
        self._calls: list[tuple[int, int, str]] = []  # autograd sequence numbers of a module's call, and its path

    @contextmanager
    def watching(self) -> Iterator[NonFiniteWatch]:
        """Watch the model's modules and everything that runs inside the context."""
        handles = []
        for path, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(path)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._running.append(path)
            self._calls.append((torch._C._autograd._get_sequence_nr(), -1, path))

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self._running.pop()
        index = max(i for i, call in enumerate(self._calls) if call[2] == path and call[1] < 0)
        self._calls[index] = (self._calls[index][0], torch._C._autograd._get_sequence_nr(), path)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.finding is not None:
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        inputs = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        on_purpose = any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in leaves)
        innocent = not inputs or on_purpose or "empty" in str(func) or not all(map(_is_finite, inputs))
        largest = 0.0 if innocent else max((float(each.abs().max()) for each in inputs if each.numel()), default=0.0)
        out = func(*args, **kwargs)
        if not innocent:
            bad = [leaf.detach() for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and not _is_finite(leaf)]
            if bad:
                self.finding = self._describe(str(func), bad[0], largest)
        return out

    def _describe(self, op: str, output: Tensor, largest: float) -> Finding:
        node = torch._C._current_autograd_node()
        phase = "forward" if node is None else "backward"
        module = (self._running or [""])[-1] if node is None else self._made_by(node._sequence_nr())
        line = ""
        if node is None:
            frames = [
                frame
                for frame in traceback.extract_stack()
                if any(Path(frame.filename).is_relative_to(package) for package in PACKAGES)
            ]
            frames = [frame for frame in frames if Path(frame.filename) not in PASSED_THROUGH]
            if frames:
                line = f"{Path(frames[-1].filename).relative_to(PROJECT)}:{frames[-1].lineno}"
        nan, inf = int(output.isnan().sum()), int(output.isinf().sum())
        return Finding(op, module, phase, tuple(output.shape), nan, inf, largest, line)

    def _made_by(self, number: int) -> str:
        """The innermost module call during which autograd gave out this sequence number."""
        inside = [call for call in self._calls if call[0] <= number < call[1]]
        return min(inside, key=lambda call: call[1] - call[0])[2] if inside else ""


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def bundle_arguments(
    session: Session, parts: list[Batch], states: list[BrainState | None], rng: dict[str, Tensor], *, reason: str
) -> dict[str, Any]:
    """The arguments of save_checkpoint for the step that read `parts`, `states` and `rng` and was skipped: parameters
    and optimiser are still those of before. Every process has to ask."""
    arguments = session.checkpoint_arguments()
    tensors = {name: tensor for name, tensor in arguments["state_tensors"].items() if not name.startswith(BRAIN)}
    for name in ("input_ids", "target_ids", "document_start"):
        whole = torch.cat([getattr(part, name) for part in parts])
        tensors[BATCH + name] = session.world.all_lanes(whole.to(session.precision.device))
    if None not in states:
        tensors |= {BRAIN + name: tensor for name, tensor in session.brain_tensors(states).items()}
    metadata = {**arguments["metadata"], "replay": reason}
    metadata["rng"] = {**metadata["rng"], **encode_torch_rng(rng)}
    return {**arguments, "state_tensors": tensors, "metadata": metadata}


def replay(path: str, *, mode: ModeConfig, device: str, dtype: str) -> list[str]:
    """Run a bundle's step again, forward, backward and the gradients' norm; return lines that say what came first.

    Raises UserError if there is no bundle at `path`.
    """
    bundle = load_checkpoint(path)
    tensors = bundle.state_tensors.load()
    if BATCH + "input_ids" not in tensors:
        raise UserError(f"{bundle.path}: is a checkpoint without a batch; give a folder that a stopped run left")
    if mode.name == "auto" and bundle.metadata["config"]["model"].get("name") == "brain":
        mode = dataclasses.replace(mode, name="unfused")  # a launch hides what happens inside it
    trained = load_trained(str(bundle.path), mode=mode, device=device, dtype=dtype)
    lines = [f"step {bundle.step} of {bundle.path}: {bundle.metadata.get('replay', '')}"]
    lines += [f"warning: {name} random generator not restored" for name in restore_rng(bundle.metadata["rng"])]
    at = trained.precision.device
    saved = {name: tensor.to(at) for name, tensor in tensors.items()}
    saved |= {f"parameter {name}": tensor for name, tensor in trained.model.state_dict().items()}
    broken = [name for name, tensor in saved.items() if not name.startswith("guard/") and not _is_finite(tensor)]
    if broken:
        return [*lines, f"not finite before the step: {', '.join(broken[:8])}"]
    batch = {name.removeprefix(BATCH): tensor.to(at) for name, tensor in tensors.items() if name.startswith(BATCH)}
    brain = {name.removeprefix(BRAIN): tensor.to(at) for name, tensor in tensors.items() if name.startswith(BRAIN)}
    state = BrainState.from_tensors(brain) if brain else None
    trained.model.train()
    with NonFiniteWatch(trained.model).watching() as watch:
        with trained.precision.autocast():
            out = trained.model(
                batch["input_ids"], state, document_start=batch["document_start"], target_ids=batch["target_ids"]
            )
        assert out.loss is not None
        out.loss.backward()
        grads = [param.grad for param in trained.model.parameters() if param.grad is not None]
        norm = nn.utils.get_total_norm(grads)  # its squares can overflow where no gradient does
    lines.append(f"loss {float(out.loss.detach()):.6g}, gradient norm {float(norm):.6g}")
    if watch.finding is None:
        lines.append("every operation was finite: the step was skipped as an outlier, or only another device shows it")
    else:
        lines.append(f"first non-finite: {watch.finding}")
    return lines
