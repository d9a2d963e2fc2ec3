"""A three-factor rule: eligibility trace x surrogate derivative x broadcast learning signal, token by token.

Tokens are read one at a time and forgotten: what is kept between two of them is the brain's state and one trace a
synapse, whatever the window's length. The neurons' drive, lateral weights, bias and time constants learn from their
traces. Everything that acts at once (decoder, output projections, gates, MLPs, the memory's projections, embedding and
relay) gets the same token's gradient, with the carried state taken as given.

With `symmetric` and `random` feedback no gradient passes from layer to layer: each gets the error at the workspace,
because what it writes there is added, and what it reads counts as given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activity import homeostatic_pull
from kernels.cortex import CortexState, cortex
from kernels.cortex.spike import derivative
from kernels.decode import IGNORE_INDEX
from kernels.gated_norm import gated_norm
from kernels.norm import add_norm
from kernels.precision import no_autocast
from neurogen.brain import BrainState
from neurogen.brain.brain import BrainOutput
from neurogen.brain.health import health_metrics
from neurogen.brain.regions import Activity, CortexLayer, MemoryLayer, activation_dtype
from neurogen.brain.state import LayerState
from neurogen.data import Batch
from neurogen.errors import UserError
from neurogen.learning.config import LocalLearningConfig
from neurogen.learning.eligibility import Trace, advance, by_decay_logit, by_drive, by_lateral, credit, own_feedback
from neurogen.learning.rule import Autocast, WindowResult
from neurogen.model import NeuroGen

MAX_MODULATION = 3.0


class _Feedback(torch.autograd.Function):
    """W h whose error goes back through another matrix than W (Lillicrap et al. 2016; Nokland 2016)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(h, feedback)
        return F.linear(h, weight)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        h, feedback = ctx.saved_tensors
        return error @ feedback.to(error.dtype), error.flatten(0, -2).T @ h.flatten(0, -2).to(error.dtype), None


@dataclass
class _Synapses:
    """One cortex layer's traces and the gradients they have gathered in this window."""

    layer: CortexLayer
    drive: Trace  # by in_proj's drive rows and, last, the bias
    lateral: Trace | None
    decay: Trace | None

    @classmethod
    def new(cls, layer: CortexLayer, lanes: int, *, time_constants: bool) -> _Synapses:
        config, like = layer.config, layer.decay_logit
        width = config.embedding_dim
        return cls(
            layer,
            Trace.zeros(lanes, width, width + 1, like),
            Trace.zeros(lanes, width, config.column_width, like) if config.lateral else None,
            Trace.zeros(lanes, width, 1, like) if time_constants else None,
        )

    @torch.no_grad()
    def advance(self, h: Tensor, drive: Tensor, before: CortexState, after: CortexState, kept: Tensor) -> None:
        """Move the traces over one token.

        Arguments:
            h, drive: what the layer read and what it drove its neurons with, `[B, D]`.
            before, after: the neurons' state around the token, `before` as reset as it was read.
            kept: `[B]`, zero where a document starts.
        """
        config = self.layer.config
        lateral_weight = self.layer.lateral_weight
        assert isinstance(lateral_weight, Tensor)
        decay = torch.sigmoid(self.layer.decay_logit)
        drive, presynaptic = drive.to(decay.dtype), F.pad(h.to(decay.dtype), (0, 1), value=1.0)
        excess = after.voltage - config.threshold - config.adaptation_strength * after.adaptation
        surrogate = derivative(excess, config.spike)
        own = own_feedback(lateral_weight, decay, config.threshold)

        def moved(trace: Trace, direct: Tensor) -> Trace:
            return advance(
                trace.reset(kept),
                direct,
                surrogate=surrogate,
                decay=decay,
                own=own,
                adaptation_strength=config.adaptation_strength,
                adaptation_decay=config.adaptation_decay,
            )

        self.drive = moved(self.drive, by_drive(presynaptic, decay))
        if self.lateral is not None:
            self.lateral = moved(self.lateral, by_lateral(before.spikes, decay, config.column_width))
        if self.decay is not None:
            direct = by_decay_logit(drive, before, lateral_weight, decay, config.threshold)
            self.decay = moved(self.decay, direct)

    @torch.no_grad()
    def learn(self, signal: Tensor) -> None:
        """Add this token's gradients to `.grad` for the learning signal `[B, D]`."""
        layer, signal = self.layer, signal.to(self.drive.spikes.dtype)
        width = layer.config.embedding_dim
        by_input = credit(signal, self.drive)
        _gradient(layer.in_proj.weight)[:width] += by_input[:, :-1]
        _gradient(layer.drive_bias).add_(by_input[:, -1])
        if self.lateral is not None:
            assert isinstance(layer.lateral_weight, Tensor)
            _gradient(layer.lateral_weight).add_(credit(signal, self.lateral).view_as(layer.lateral_weight))
        if self.decay is not None:
            _gradient(layer.decay_logit).add_(credit(signal, self.decay)[:, 0])


def _gradient(parameter: Tensor) -> Tensor:
    """`.grad`, made of zeros if there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@dataclass
class _Token:
    """One token's pass: the workspace's end, the next state, and what the traces need."""

    broca_output: Tensor
    state: BrainState
    probes: dict[str, Tensor]
    activity: dict[str, Activity]
    go: Tensor | None


class LocalLearning:
    """The rule for a NeuroGen; runs the reference operations in every mode.

    Arguments:
        model: on its device; a tied embedding is refused, since its two roles would get different signals.
        config: feedback, dopamine and what learns.
        seed: of the random feedback.

    Traces begin at zero in every window, as BPTT's memory of parameters does; the reward prediction is carried.
    """

    def __init__(self, model: NeuroGen, config: LocalLearningConfig, *, seed: int) -> None:
        if model.config.tie_embedding and config.feedback == "random":
            raise UserError("learning.feedback=random: needs model.tie_embedding=false, the decoder is the embedding")
        if model.config.dropout:
            raise UserError(
                f"learning=local: trains without model.dropout, which is {model.config.dropout}; set it to 0, or use "
                "learning=bptt"
            )
        self.config = config
        weight = model.decoder.weight
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
        self.feedback = drawn.to(weight.device, weight.dtype) if config.feedback == "random" else None
        self.predicted_loss = torch.zeros((), dtype=torch.float64, device=weight.device)
        self.num_predicted = torch.zeros((), dtype=torch.float64, device=weight.device)

    def state_tensors(self) -> dict[str, Tensor]:
        return {"predicted_loss": self.predicted_loss, "num_predicted": self.num_predicted}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the prediction; without one (the run learnt by back-propagation so far) it begins now."""
        for name, tensor in tensors.items():
            self.state_tensors()[name].copy_(tensor)

    def learn(
        self, model: NeuroGen, batch: Batch, state: BrainState | None, *, share: float | None, autocast: Autocast
    ) -> WindowResult:
        """See `LearningRule`."""
        lanes, num_tokens = batch.input_ids.shape
        state = model.init_state(lanes) if state is None else state.detach()
        synapses = {
            name: _Synapses.new(layer, lanes, time_constants=self.config.time_constants)
            for name, layer in model.brain.layers().items()
            if isinstance(layer, CortexLayer)
        }
        num_targets = (batch.target_ids != IGNORE_INDEX).sum().clamp_min(1).double()
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=model.device)
        fired: dict[str, Activity] = {}
        go_sum: Tensor | None = None
        for t in range(num_tokens):
            now = slice(t, t + 1)
            starts = batch.document_start[:, now]
            with autocast():
                token = self._forward(model, batch.input_ids[:, now], state, starts, synapses)
                logits = self._decode(model, token.broca_output[:, 0])
            targets = batch.target_ids[:, t]
            losses = F.cross_entropy(logits.to(total.dtype), targets, ignore_index=IGNORE_INDEX, reduction="none")
            counted = targets != IGNORE_INDEX
            if share:
                modulation = self._dopamine(losses.detach(), counted)
                ((losses * modulation).sum() * (share / num_targets)).backward()
                for name, probe in token.probes.items():
                    assert probe.grad is not None
                    synapses[name].learn(probe.grad)
            total += losses.detach().sum()
            num_correct += ((logits.detach().argmax(-1) == targets) & counted).sum()
            state = token.state
            fired = {name: _added(fired.get(name), each) for name, each in token.activity.items()}
            if token.go is not None:
                mean = token.go.detach().float().mean()
                go_sum = mean if go_sum is None else go_sum + mean
        if share and model.config.homeostasis:
            self._pull(model, fired, num_targets, share)
        go = None if go_sum is None else go_sum / num_tokens
        health = health_metrics(BrainOutput(total, state, fired, go))
        return WindowResult((total / num_targets).to(model.decoder.weight.dtype), num_correct, state, health)

    @torch.no_grad()
    def _pull(self, model: NeuroGen, fired: dict[str, Activity], num_targets: Tensor, share: float) -> None:
        """Homeostasis: a neuron's own rate decides, so it is as local as can be."""
        config = model.config
        for name, activity in fired.items():
            pull = homeostatic_pull(
                activity.num_fired,
                activity.num_tokens,
                num_targets,
                strength=config.homeostasis,
                target=config.firing_rate,
            )
            bias = model.brain.cortex_layers()[name].drive_bias
            _gradient(bias).add_(share * pull.to(bias.dtype))

    def _forward(
        self, model: NeuroGen, token_ids: Tensor, state: BrainState, starts: Tensor, synapses: dict[str, _Synapses]
    ) -> _Token:
        """`Brain.forward` for one token a lane, `[B, 1]`; the state and (unless spatial) every reading is detached."""
        brain, eps = model.brain, model.config.norm_eps
        spatial = self.config.feedback == "spatial"
        x, recent_ids = brain.thalamus(token_ids, model.embedding.weight, state.recent_ids, starts, "reference")
        layers: dict[str, LayerState] = {}
        probes: dict[str, Tensor] = {}
        activity: dict[str, Activity] = {}
        go: Tensor | None = None
        for name, layer in brain.layers().items():
            seen = x if spatial else x.detach()
            h = add_norm(seen, eps=eps, out_dtype=activation_dtype(x)).normed
            before = state.layers[name]
            if isinstance(layer, MemoryLayer):
                total, delta, after = layer(seen, h, before, starts, "reference")  # type: ignore[arg-type]
                layers[name] = type(after)(*(part.detach() for part in after))
            else:
                assert isinstance(layer, CortexLayer)
                assert isinstance(before, CortexState)
                in_broca = name.startswith("broca.")
                if in_broca and go is None and brain.basal_ganglia is not None:
                    go = brain.basal_ganglia(h)
                total, delta, layers[name], activity[name], probes[name] = _cortex_token(
                    layer, seen, h, before, starts, go if in_broca else None, synapses[name]
                )
            # The workspace keeps its sum's gradient whatever was cut from its readings: x - x.detach() is zero.
            x = total + delta if spatial else total + delta + (x - x.detach())
        return _Token(x, BrainState(state.position + 1, recent_ids, layers), probes, activity, go)

    def _decode(self, model: NeuroGen, broca_output: Tensor) -> Tensor:
        """Logits `[B, V]`, with the feedback chosen."""
        if self.feedback is None:
            return model.decoder(broca_output)
        with no_autocast(broca_output):
            normed = add_norm(broca_output, eps=model.config.norm_eps).normed.to(model.decoder.weight.dtype)
            return _Feedback.apply(normed, model.decoder.weight, self.feedback)

    @torch.no_grad()
    def _dopamine(self, losses: Tensor, counted: Tensor) -> Tensor:
        """How much each lane learns from this token, `[B]`, in [0, MAX_MODULATION].

        1 + dopamine (loss - predicted) / predicted: a token as hard as predicted teaches as ever, a worse surprise
        more, and reward beyond expectation less. The prediction is a running mean, unbiased from its first token.
        """
        if self.config.dopamine == 0:
            return torch.ones_like(losses)
        keep, num_lanes = self.config.prediction_decay, counted.sum()
        known = 1 - keep**self.num_predicted  # the running mean's weights so far sum to this
        predicted = torch.where(known > 0, self.predicted_loss / known.clamp_min(1e-12), losses.mean()).clamp_min(1e-3)
        surprise = (losses - predicted) / predicted
        mean = (losses * counted).sum() / num_lanes.clamp_min(1)
        some = num_lanes > 0
        self.predicted_loss.copy_(torch.where(some, torch.lerp(mean, self.predicted_loss, keep), self.predicted_loss))
        self.num_predicted += some
        return (1 + self.config.dopamine * surprise).clamp(0.0, MAX_MODULATION)


def _cortex_token(
    layer: CortexLayer,
    x: Tensor,
    h: Tensor,
    before: CortexState,
    starts: Tensor,
    go: Tensor | None,
    synapses: _Synapses,
) -> tuple[Tensor, Tensor, CortexState, Activity, Tensor]:
    """`CortexLayer.forward` for one token, its neurons' parameters left to their traces.

    Returns what that does, the state detached, and a probe: zeros added to the spikes, whose gradient is the signal.
    """
    config, width = layer.config, layer.config.embedding_dim
    lateral_weight = layer.lateral_weight
    assert isinstance(lateral_weight, Tensor)
    drive = F.linear(h, layer.in_proj.weight[:width].detach(), layer.drive_bias.detach().to(h.dtype))
    gate = F.linear(h, layer.in_proj.weight[width:])
    out = cortex(
        drive,
        lateral_weight.detach(),
        torch.sigmoid(layer.decay_logit.detach()),
        before,
        starts,
        spike_kind=config.spike,
        threshold=config.threshold,
        adaptation_strength=config.adaptation_strength,
        adaptation_decay=config.adaptation_decay,
    )
    kept = (~starts[:, 0]).to(layer.decay_logit.dtype)
    state = CortexState(*(part.detach() for part in out.state))
    read = CortexState(*(part * kept[:, None] for part in before))
    synapses.advance(h.detach()[:, 0], drive.detach()[:, 0], read, state, kept)
    probe = torch.zeros_like(out.spikes[:, 0], requires_grad=True)
    spikes = out.spikes + probe[:, None]
    y = gated_norm(spikes, gate, group_size=config.column_width, scale=go, eps=config.norm_eps)
    x, normed = add_norm(x, layer.out_proj(y), eps=config.norm_eps, out_dtype=activation_dtype(x))
    activity = Activity(out.num_fired, out.num_saturated, x.shape[0])
    return x, layer.mlp(normed, "reference"), state, activity, probe


def _added(so_far: Activity | None, new: Activity) -> Activity:
    if so_far is None:
        return new
    return Activity(
        so_far.num_fired + new.num_fired,
        so_far.num_saturated + new.num_saturated,
        so_far.num_tokens + new.num_tokens,
    )
