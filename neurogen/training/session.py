"""What a run is made of at one moment, and how that moment is saved and restored.

A session restored from a checkpoint takes the same steps as one that never stopped: parameters, optimiser, brain
state of every lane, position in the data, random generators, and the averages of an unfinished logging interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neurogen.brain import BrainConfig, BrainState
from neurogen.config.compose import config_to_dict
from neurogen.data import Batches, Corpus, make_batches
from neurogen.data.config import default_cache_dir
from neurogen.data.prefetch import Prefetcher
from neurogen.errors import UserError
from neurogen.learning import LearningRule, make_learning_rule
from neurogen.model import NeuroGen
from neurogen.models import LanguageModel, build_model
from neurogen.modes import TOKEN_BY_TOKEN, check_dropout_runs
from neurogen.training.checkpoint import Checkpoint
from neurogen.training.distributed import SINGLE, World, device_of, shard_like, whole
from neurogen.training.guard import Guard
from neurogen.training.meter import Meter
from neurogen.training.optimizer import ModelOptimizer, build_optimizer
from neurogen.training.precision import Precision, resolve_device
from neurogen.training.rng import capture_rng, restore_rng
from neurogen.training.schedule import Progress

if TYPE_CHECKING:
    from neurogen.config.schema import Config

BRAIN, METER, GUARD, LEARNING = "brain/", "meter/", "guard/", "learning/"


@dataclass
class Session:
    """Everything that changes while a run trains, and the corpus it reads.

    states: the brain's state of each part of this process's lanes (see Update); None where windows are independent or
    nothing was read yet. spread: the model as the training step calls it (see World.spread).
    """

    config: Config
    corpus: Corpus
    precision: Precision
    model: LanguageModel
    optimizer: ModelOptimizer
    batches: Batches | Prefetcher
    meter: Meter
    guard: Guard
    spread: nn.Module
    learning: LearningRule
    world: World = SINGLE
    progress: Progress = field(default_factory=Progress)
    states: list[BrainState | None] = field(default_factory=list)

    @property
    def carries_state(self) -> bool:
        """Whether lanes go on from window to window (truncated back-propagation through time)."""
        return self.config.data.batching == "lanes"

    @property
    def starts_documents(self) -> bool:
        """Whether the training text marks where documents start."""
        return self.corpus.train.document_start_id is not None

    def checkpoint_arguments(self) -> dict[str, Any]:
        """The keyword arguments of save_checkpoint, all but the directory and the score; of all processes together, so
        each of them has to ask."""
        meter_tensors, meter_names = self.meter.state()
        state_tensors = {METER + name: tensor for name, tensor in meter_tensors.items()}
        state_tensors |= {GUARD + name: tensor for name, tensor in self.guard.state().items()}
        state_tensors |= {LEARNING + name: tensor for name, tensor in self.learning.state_tensors().items()}
        if self.carries_state and None not in self.states:
            state_tensors |= {BRAIN + name: tensor for name, tensor in self.brain_tensors(self.states).items()}
        return {
            "step": self.progress.step,
            "model_tensors": {name: whole(tensor) for name, tensor in self.model.state_dict().items()},
            "optimizer_tensors": self.optimizer.state_tensors(),
            "state_tensors": state_tensors,
            "metadata": {
                "tokens": self.progress.tokens,
                "seconds": self.progress.seconds,
                "config": config_to_dict(self.config),
                "data_position": self.batches.state_dict(),
                "data_fingerprint": self.corpus.fingerprint,
                "tokenizer_fingerprint": self.corpus.tokenizer.fingerprint,
                "vocab_size": self.model.vocab_size,
                "starts_documents": self.starts_documents,
                "meter_names": meter_names,
                "rng": capture_rng(),
            },
            "tokenizer": self.corpus.tokenizer,
        }

    def brain_tensors(self, states: Sequence[BrainState | None]) -> dict[str, Tensor]:
        """The lanes of all parts and processes as one state's flat tensors."""
        known = BrainState.cat([state for state in states if state is not None])
        return {name: self.world.all_lanes(tensor) for name, tensor in known.tensors().items()}

    def divided_states(self, num_parts: int) -> list[BrainState | None]:
        """The states with the lanes divided into another number of parts."""
        known = [state for state in self.states if state is not None]
        if len(known) < len(self.states):
            return [None] * num_parts
        together = BrainState.cat(known)
        return [together.select(part.tolist()) for part in torch.arange(together.lanes).chunk(num_parts)]

    def close(self) -> None:
        """End the thread that reads ahead, where there is one."""
        if isinstance(self.batches, Prefetcher):
            self.batches.close()

    def restore(self, checkpoint: Checkpoint) -> list[str]:
        """Become what was saved; return the names of random generators that could not be restored.

        Raises UserError where that would corrupt the run: another vocabulary, corpus, model, optimiser or shape of
        the lanes.
        """
        saved = checkpoint.metadata
        if saved["tokenizer_fingerprint"] != self.corpus.tokenizer.fingerprint:
            raise UserError(
                f"data.tokenizer: this data's vocabulary ({self.corpus.tokenizer.vocab_size} ids) is not the one "
                f"{checkpoint.path} was trained with ({saved['vocab_size']} ids); resume with the same data"
            )
        if saved["data_fingerprint"] != self.corpus.fingerprint:
            raise UserError(
                f"data: the text is not the one {checkpoint.path} was trained on; give the same files, or start anew"
            )
        load_weights(self.model, checkpoint)
        self.optimizer.load_state_tensors(checkpoint.optimizer_tensors.load())
        self.batches.load_state_dict(saved["data_position"])
        self.progress = Progress(checkpoint.step, int(saved["tokens"]), float(saved["seconds"]))
        tensors = checkpoint.state_tensors.load(device=str(self.precision.device))
        self.meter.load_state(_under(METER, tensors), list(saved["meter_names"]))
        self.guard.load_state(_under(GUARD, tensors))
        self.learning.load_state_tensors(_under(LEARNING, tensors))
        brain = _under(BRAIN, tensors)
        if self.carries_state and brain:
            self.states = self._divide(BrainState.from_tensors(brain))
        return restore_rng(saved["rng"])

    def _divide(self, state: BrainState) -> list[BrainState | None]:
        """This process's lanes of a state in as many parts as a step takes."""
        lanes = self.config.data.lanes
        state.check_fits(self.model.init_state(lanes))
        own = torch.arange(lanes).chunk(self.world.size)[self.world.rank]
        return [state.select(part.tolist()) for part in own.chunk(self.config.trainer.accumulation)]


def build_session(config: Config, corpus: Corpus, world: World = SINGLE) -> Session:
    """A new session at step 0. Raises UserError for a mode, device or size that cannot be had."""
    world.share(config.data.lanes // config.trainer.accumulation, "data.lanes / trainer.accumulation")
    device = resolve_device(device_of(world, config.trainer.device))
    precision = Precision.resolve(device, config.trainer.dtype)
    if world.size > 1 and config.learning.name != "bptt":
        raise UserError(f"learning={config.learning.name}: runs in one process, not in {world.size}; use learning=bptt")
    if isinstance(config.model, BrainConfig):
        check_dropout_runs(config.mode.name, config.model.dropout)
    batches = make_batches(corpus.train, config.data, seed=config.seed, rank=world.rank, world_size=world.size)
    torch.manual_seed(config.seed)
    model = build_model(
        config.model,
        vocab_size=corpus.tokenizer.vocab_size,
        mode=config.mode,
        precision=precision,
        starts_documents=corpus.train.document_start_id is not None,
        window=config.data.window,
        cache_dir=Path(config.data.cache_dir) if config.data.cache_dir else default_cache_dir(),
    )
    precision.place(model)
    spread = world.spread(model, sharding_units(model))
    states: list[BrainState | None] = [None] * config.trainer.accumulation
    return Session(
        config,
        corpus,
        precision,
        model,
        build_optimizer(model, config.optimizer),
        read_ahead(batches, device),
        Meter(device),
        Guard(device, sigma=config.trainer.outlier_sigma),
        spread,
        make_learning_rule(config.learning, model, seed=config.seed),
        world,
        states=states,
    )


def sharding_units(model: LanguageModel) -> list[nn.Module]:
    """What FSDP gathers apart from the rest of the model: the brain's layers, where a mode calls each of them once a
    sequence. The others call them at every token, or reach into them."""
    if not isinstance(model, NeuroGen) or model.mode.name in TOKEN_BY_TOKEN:
        return []
    return list(model.brain.layers().values())


def read_ahead(batches: Batches, device: torch.device) -> Batches | Prefetcher:
    """On a GPU, batches made and copied while it works on the ones before."""
    return Prefetcher(batches, device) if device.type == "cuda" else batches


def load_weights(model: LanguageModel, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's parameters into a model of the same shape. Raises UserError, naming the tensor, if one does
    not fit."""
    own: dict[str, Tensor] = dict(model.state_dict())
    saved = checkpoint.model_tensors
    for name in sorted(own.keys() ^ set(saved)):
        where = "the checkpoint lacks" if name in own else "the model has no"
        raise UserError(f"{checkpoint.path}: {where} {name}; use the checkpoint's own model.* settings")
    for name, tensor in saved.load().items():
        if own[name].shape != tensor.shape:
            raise UserError(
                f"{checkpoint.path}: {name} has shape {tuple(tensor.shape)}, the model "
                f"{tuple(own[name].shape)}; use the checkpoint's own model.* settings and tokenizer"
            )
        with torch.no_grad():
            own[name].copy_(shard_like(tensor, own[name]))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
