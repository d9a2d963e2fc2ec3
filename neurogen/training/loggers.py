"""Mirrors of a run's metrics elsewhere. metrics.jsonl is the source of truth; no failure here stops training."""

import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from neurogen.errors import UserError
from neurogen.storage.files import write_atomically
from neurogen.training.metrics import Row

RUN_ID_NAME = "wandb_run_id"
_MODES = ("offline", "online")
_MAX_SAMPLE_ROWS = 200


@dataclass
class LoggerConfig:
    """Choices of the `logger` group. mode: "offline" (no account, no network) or "online"; the rest is W&B's naming."""

    name: str = "none"
    mode: str = "offline"
    project: str = "neurogen"
    entity: str | None = None
    group: str | None = None
    run_name: str | None = None
    tags: list[str] = field(default_factory=list)


class Logger(Protocol):
    """What the trainer tells a logger, in this order: start, any number of log calls, finish."""

    def start(self, *, config: dict[str, Any], run_dir: Path) -> None: ...

    def log(self, row: Row) -> None: ...

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None: ...

    def log_images(self, images: Mapping[str, Path], *, step: int) -> None: ...

    def finish(self, state: str) -> None: ...


class NullLogger:
    """Mirror nothing."""

    def start(self, *, config: dict[str, Any], run_dir: Path) -> None:
        """Do nothing."""

    def log(self, row: Row) -> None:
        """Do nothing."""

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Do nothing."""

    def log_images(self, images: Mapping[str, Path], *, step: int) -> None:
        """Do nothing."""

    def finish(self, state: str) -> None:
        """Do nothing."""


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class WandbLogger:
    """Mirror to Weights & Biases, offline unless the mode is "online". Offline, nothing goes over the network.

    W&B's files lie in the run directory, and so does the run id, so that a resumed run continues the same W&B run.
    The first error of W&B (its package missing, no network, a full disk) is told in one line and ends the mirroring,
    not the training.
    """

    def __init__(self, config: LoggerConfig, *, warn: Callable[[str], None] = _warn) -> None:
        self._config = config
        self._warn = warn
        self._run: Any = None
        self._samples: list[list[Any]] = []
        self._columns: list[str | int] = []

    def _guard(self, action: Callable[[], None]) -> None:
        """Run what talks to W&B. Any Exception is caught: nothing a mirror runs into is worth a training run."""
        try:
            action()
        except Exception as error:
            self._run = None
            reason = " ".join(str(error).split())[:200]
            self._warn(
                f"warning: W&B logging is off from here on ({type(error).__name__}: {reason}); metrics.jsonl goes on"
            )

    def start(self, *, config: dict[str, Any], run_dir: Path) -> None:
        """Begin, or with a run id left in `run_dir` continue, a W&B run. Never prompts offline."""
        self._guard(lambda: self._start(config, run_dir))

    def _start(self, config: dict[str, Any], run_dir: Path) -> None:
        online = self._config.mode == "online"
        if not online:
            # Otherwise its service looks up W&B's server in order to report its own errors, offline or not.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # here, because it takes a second to import and training must work without it

        id_path = run_dir / RUN_ID_NAME
        known_id = id_path.read_text(encoding="ascii").strip() if id_path.exists() else None
        run_id = known_id or secrets.token_hex(4)
        self._run = wandb.init(
            mode="online" if online else "offline",
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            name=self._config.run_name or run_dir.name,
            tags=list(self._config.tags),
            id=run_id,
            resume="allow" if online else None,
            dir=str(run_dir.absolute()),
            config=config,
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, disable_git=True, save_code=False),
        )
        if known_id is None:
            write_atomically(id_path, run_id.encode("ascii") + b"\n")
        # The default axis counts log calls, which a resumed run repeats; steps and tokens are what curves are read
        # against.
        self._run.define_metric("step")
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        """Mirror one row of metrics.jsonl."""
        if self._run is not None:
            self._guard(lambda: self._run.log(dict(row)))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Mirror generated samples as the table "samples", with the step as first column (the newest 200 rows)."""
        if self._run is not None and rows:
            self._guard(lambda: self._log_samples(rows, step))

    def _log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        import wandb

        columns: list[str | int] = ["step", *rows[0]]
        if columns != self._columns:
            self._columns, self._samples = columns, []
        self._samples += [[step, *(row[str(name)] for name in columns[1:])] for row in rows]
        # W&B shows one table, the last one logged: each holds all samples so far.
        self._samples = self._samples[-_MAX_SAMPLE_ROWS:]
        self._run.log({"samples": wandb.Table(columns=columns, data=self._samples), "step": step})

    def log_images(self, images: Mapping[str, Path], *, step: int) -> None:
        """Mirror image files under the given names."""
        if self._run is not None and images:
            self._guard(lambda: self._log_images(images, step))

    def _log_images(self, images: Mapping[str, Path], step: int) -> None:
        import wandb

        self._run.log({**{name: wandb.Image(str(path)) for name, path in images.items()}, "step": step})

    def finish(self, state: str) -> None:
        """End the W&B run; it counts as failed there unless the state is "finished" or "interrupted"."""
        if self._run is not None:
            self._guard(lambda: self._finish(state))

    def _finish(self, state: str) -> None:
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state in ("finished", "interrupted") else 1)
        self._run = None


def make_logger(config: LoggerConfig) -> Logger:
    """Return the logger of a configuration. Raises UserError for a name or mode that does not exist."""
    if config.mode not in _MODES:
        raise UserError(f"logger.mode={config.mode!r} does not exist; choose one of {', '.join(_MODES)}")
    if config.name == "wandb":
        return WandbLogger(config)
    if config.name == "none":
        return NullLogger()
    raise UserError(f"logger.name={config.name!r} does not exist; choose wandb or none")
