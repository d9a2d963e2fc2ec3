"""A whole run, from its configuration to its exit code: what scripts/train.py does."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from typing import Any

import numpy as np
import torch

from neurogen.config.compose import build_config, config_to_dict
from neurogen.config.schema import Config
from neurogen.data import build_corpus
from neurogen.errors import UserError
from neurogen.machine import machine_facts
from neurogen.training.checkpoint import Checkpoint, load_checkpoint
from neurogen.training.distributed import World, connect
from neurogen.training.loggers import make_logger
from neurogen.training.progress import make_progress
from neurogen.training.recorder import Recorder, SilentRecorder
from neurogen.training.resume import config_difference, prepare_run
from neurogen.training.run_directory import RunDirectory
from neurogen.training.session import Session, build_session
from neurogen.training.signals import StopRequest
from neurogen.training.trainer import INTERRUPTED, Trainer

# Changing these would give the saved weights, moments or lanes another meaning; the data's position and text are
# checked apart.
FIXED_KEYS = (
    "model.",
    "data.tokenizer",
    "data.vocab_size",
    "data.batching",
    "data.shuffle",
    "data.lanes",
    "optimizer.name",
    "seed",
)
# Where a run is kept and how it was asked for say nothing about what it computes.
PLACE_KEYS = ("run_dir", "resume")


def train(config: Config) -> int:
    """Train as configured; return the exit code: 0, 130 after Ctrl-C, 143 after SIGTERM, 74 after a file that the disk
    refused if trainer.on_save_failure is stop (all saved).

    Raises UserError for what the user can mend, before a run directory exists if it can be known by then.
    """
    world = connect(config.trainer.distributed, config.trainer.device)
    try:
        return _train(config, world)
    finally:
        world.close()


def _train(config: Config, world: World) -> int:
    seed_everything(config.seed)
    set_arithmetic(config)
    with world.one_by_one():
        corpus = build_corpus(config.data)
    session = build_session(config, corpus, world)
    logger = make_logger(config.logger)
    run, checkpoint = open_run(config, world)
    with contextlib.closing(session), run, StopRequest() as stop:
        lines = [] if checkpoint is None else continue_from(session, checkpoint)
        recorder: Recorder | SilentRecorder = SilentRecorder(session, run)
        if world.is_main:
            limits = {key: getattr(config.trainer, key) for key in ("max_steps", "max_tokens", "max_seconds")}
            display = make_progress(**limits)
            for line in lines:
                display.say(line)
            if checkpoint is not None:
                run.rewind(checkpoint.step)
            if config.resume is not None:
                run.write_config(config_to_dict(config))
            run.write_machine(machine_facts(session.precision.device))
            recorder = Recorder(session, run, logger, display, resumed=config.resume is not None, stop=stop)
        with recorder:
            if corpus.left_out:
                recorder.say(corpus.left_out)
            recorder.say(describe(session, run.path, checkpoint))
            state, reason = Trainer(session, recorder).fit(stop)
            saved = recorder.finish(state, reason=reason)
        if world.is_main:
            print(f"{state} at step {session.progress.step} ({reason}); saved {saved}", file=sys.stderr)
            if state == INTERRUPTED:
                print(f"continue with: python scripts/train.py resume={run.path}", file=sys.stderr)
        return world.highest(stop.exit_code)


def open_run(config: Config, world: World) -> tuple[RunDirectory, Checkpoint | None]:
    """The run directory, held by rank 0 and viewed by the others, and the checkpoint all go on from."""
    run: RunDirectory | None = None
    found: dict[str, Any] = {}
    checkpoint: Checkpoint | None = None
    if world.is_main:
        try:
            run, checkpoint = prepare_run(run_dir=config.run_dir, resume=config.resume, config=config_to_dict(config))
            found = {"run": str(run.path), "checkpoint": None if checkpoint is None else str(checkpoint.path)}
        except UserError as error:
            found = {"error": str(error)}
    found = world.tree_from_main(found)
    if "error" in found:
        raise UserError(found["error"])
    if run is None:
        run = RunDirectory.view(found["run"])
        checkpoint = load_checkpoint(found["checkpoint"]) if found["checkpoint"] else None
    return run, checkpoint


def continue_from(session: Session, checkpoint: Checkpoint) -> list[str]:
    """Restore a session; return lines to say about it. Raises UserError where that would corrupt the run."""
    lines = compare_configs(checkpoint, config_to_dict(session.config))
    for name in session.restore(checkpoint):
        lines.append(f"warning: the {name} random generator could not be restored; draws from it will differ")
    return lines


def seed_everything(seed: int) -> None:
    """Seed every global random generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_arithmetic(config: Config) -> None:
    """Set torch's process-wide switches: TF32 off unless bfloat16 was good enough anyway, deterministic kernels if
    asked for."""
    exact = config.trainer.dtype in ("float32", "float64")
    torch.set_float32_matmul_precision("highest" if exact else "high")
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(config.trainer.deterministic)


def compare_configs(checkpoint: Checkpoint, config: dict[str, Any]) -> list[str]:
    """One line a setting that differs from the checkpoint's. Raises UserError for one that must not."""
    lines = []
    # A checkpoint older than a setting was made with what is that setting's default now.
    saved = config_to_dict(build_config(checkpoint.metadata["config"], Config))
    for key, (old, new) in config_difference(saved, config).items():
        if key in PLACE_KEYS:
            continue
        if key.startswith(FIXED_KEYS):
            raise UserError(
                f"{key}={new}: the run to resume has {key}={old}, and its checkpoint means nothing otherwise; keep it"
            )
        lines.append(f"changed since the checkpoint: {key}: {old} -> {new}")
    return lines


def describe(session: Any, path: Any, checkpoint: Checkpoint | None) -> str:
    """One line at the start: what trains, on what, where."""
    start = "from the start" if checkpoint is None else f"from step {checkpoint.step}"
    return (
        f"{session.model.num_parameters():,} parameters, mode={session.model.mode.name}, {session.precision.name} on "
        f"{session.precision.device}, {len(session.corpus.train):,} training tokens; {path} {start}"
    )
