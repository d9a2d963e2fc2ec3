"""A whole brain, a token at a time in buffers, forward and in reverse."""

from __future__ import annotations

from torch import Tensor

from neurogen.brain import Brain, BrainState
from neurogen.brain.regions import Activity, CortexLayer, MemoryLayer
from neurogen.brain.state import LayerState
from neurogen.modes.preallocated.buffers import Room
from neurogen.modes.preallocated.cortex import CortexStep
from neurogen.modes.preallocated.dense import GoStep, SwiGLUStep
from neurogen.modes.preallocated.memory import MemoryStep
from neurogen.modes.preallocated.relay import RelayStep
from neurogen.probes import stage


class BrainSteps:
    """Buffers of every region for one sequence.

    Arguments:
        room: where they are made.
        brain: whose weights are used.
        embedding: the table `[V, D]`.
    """

    def __init__(self, room: Room, brain: Brain, embedding: Tensor) -> None:
        self.room = room
        self.relay = RelayStep(room, brain, embedding)
        self.circuits: dict[str, CortexStep | MemoryStep] = {}
        self.mlps: dict[str, SwiGLUStep] = {}
        for name, layer in brain.layers().items():
            assert isinstance(layer, CortexLayer | MemoryLayer)
            self.circuits[name] = CortexStep(room, layer) if isinstance(layer, CortexLayer) else MemoryStep(room, layer)
            self.mlps[name] = SwiGLUStep(room, layer.mlp, brain.config.norm_eps)
        self.gates = None if brain.basal_ganglia is None else GoStep(room, brain.basal_ganglia)

    @property
    def inputs(self) -> list[Tensor]:
        """Everything a gradient goes to, but the state."""
        tensors = list(self.relay.inputs)
        for name, circuit in self.circuits.items():
            tensors += circuit.inputs + self.mlps[name].inputs
        return tensors if self.gates is None else tensors + self.gates.inputs

    def start(self, state: BrainState) -> None:
        self.relay.start(state.recent_ids)
        for name, circuit in self.circuits.items():
            circuit.start(state.layers[name])  # type: ignore[arg-type]

    def layer_states(self, t: int) -> dict[str, LayerState]:
        """New tensors with the state after t tokens."""
        return {name: circuit.state(t) for name, circuit in self.circuits.items()}

    def activity(self, num_tokens: int) -> dict[str, Activity]:
        return {
            name: circuit.activity(num_tokens)
            for name, circuit in self.circuits.items()
            if isinstance(circuit, CortexStep)
        }

    def freeze(self, t: int, done: Tensor) -> None:
        """Undo token t in the lanes that are done, `[B]` bool."""
        for circuit in self.circuits.values():
            circuit.freeze(t, done)

    def forward(self, t: int, ids: Tensor, x: Tensor, kept: Tensor | None) -> Tensor | None:
        """Token t of every lane: ids `[B]` to Broca's output, written to x `[B, D]`; returns the gates `[B, K]`."""
        i = t if self.room.saved else 0
        go = None
        with stage("embed"):
            self.relay.forward(t, ids, x)
        with stage("cognitive_step"):
            for name, circuit in self.circuits.items():
                if isinstance(circuit, MemoryStep):
                    circuit.forward(t, x, kept)
                else:
                    in_broca = name.startswith("broca.")
                    if in_broca and go is None and self.gates is not None:
                        go = self.gates.forward(i, x)
                    circuit.forward(t, x, kept, go if in_broca else None)
                self.mlps[name].forward(i, x)
        return go

    def prepare_backward(self, grad_states: dict[str, LayerState]) -> None:
        self.relay.prepare_backward()
        for name, circuit in self.circuits.items():
            circuit.prepare_backward(grad_states[name])  # type: ignore[arg-type]
            self.mlps[name].prepare_backward()
        if self.gates is not None:
            self.gates.prepare_backward()

    def backward(self, t: int, grad_x: Tensor, kept: Tensor | None, grad_go: Tensor | None) -> None:
        """Token t in reverse; the gradient at Broca's output, grad_x `[B, D]`, and at the gates, are overwritten."""
        go = None if self.gates is None else self.gates.go[t]
        for name, circuit in reversed(self.circuits.items()):
            self.mlps[name].backward(t, grad_x)
            if isinstance(circuit, MemoryStep):
                circuit.backward(t, grad_x, kept)
                continue
            in_broca = name.startswith("broca.")
            circuit.backward(t, grad_x, kept, go if in_broca else None, grad_go)
            if name == "broca.0" and self.gates is not None:
                assert grad_go is not None
                self.gates.backward(t, grad_go, grad_x)
        self.relay.backward(t, grad_x)

    def gradients(self, input_ids: Tensor) -> list[Tensor]:
        """In the order of `inputs`."""
        grads = self.relay.gradients(input_ids)
        for name, circuit in self.circuits.items():
            grads += circuit.gradients() + self.mlps[name].gradients()
        return grads if self.gates is None else grads + self.gates.gradients()

    def grad_states(self) -> dict[str, LayerState]:
        return {name: circuit.grad_state() for name, circuit in self.circuits.items()}


def flat_states(layers: dict[str, LayerState]) -> list[Tensor]:
    return [tensor for layer in layers.values() for tensor in layer]


def named_states(like: dict[str, LayerState], flat: list[Tensor]) -> dict[str, LayerState]:
    """The inverse of `flat_states`, for layers of the same kinds as `like`."""
    tensors = iter(flat)
    layers: dict[str, LayerState] = {}
    for name, layer in like.items():
        layers[name] = type(layer)(*[next(tensors) for _ in layer])
    return layers
