"""What a run leaves behind: rows of metrics, samples, checkpoints, plots and a status, in its directory and at its
logger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurogen.config.compose import config_to_dict
from neurogen.diagnosis.health import measure_health
from neurogen.diagnosis.health_plots import draw_health
from neurogen.errors import UserError
from neurogen.training.checkpoint import CheckpointNotSaved, save_checkpoint
from neurogen.training.checkpoint_saver import AsyncCheckpointSaver
from neurogen.training.distributed import FSDP
from neurogen.training.loggers import Logger
from neurogen.training.metrics import MetricsWriter
from neurogen.training.plots import plot_run
from neurogen.training.progress import Progress as ProgressDisplay
from neurogen.training.run_directory import RunDirectory
from neurogen.training.samples import format_samples

if TYPE_CHECKING:
    from neurogen.training.session import Session


class Recorder:
    """One run's output; a context that ends the logger, the metrics file and the checkpoint thread.

    Arguments:
        session: what is recorded.
        run: the directory, already locked.
        logger: mirrors metrics and samples.
        display: the progress bar or lines.
        resumed: whether the session continues from its progress; rows after it are cut.
    """

    def __init__(
        self, session: Session, run: RunDirectory, logger: Logger, display: ProgressDisplay, *, resumed: bool
    ) -> None:
        trainer = session.config.trainer
        self._session = session
        self._run = run
        self._logger = logger
        self._display = display
        self._metrics = MetricsWriter(run.metrics_path, resume_step=session.progress.step if resumed else None)
        self._saver = AsyncCheckpointSaver(run.checkpoints, keep_last=trainer.keep_last, keep_best=trainer.keep_best)
        self._last_checkpoint: Path | None = None
        self._finished_as = "failed"
        logger.start(config=config_to_dict(session.config), run_dir=run.path)
        self.status("running")

    def status(self, state: str, *, reason: str = "") -> None:
        """Write status.json; the last state written is what the logger ends with."""
        progress = self._session.progress
        self._finished_as = state if state != "running" else "failed"
        self._run.write_status(
            state,
            step=progress.step,
            tokens=progress.tokens,
            seconds=progress.seconds,
            reason=reason,
            last_checkpoint=self._last_checkpoint,
        )

    def row(self, metrics: dict[str, float]) -> None:
        """Write the one row of this step."""
        progress = self._session.progress
        row = self._metrics.write(metrics, step=progress.step, tokens=progress.tokens, seconds=progress.seconds)
        self._logger.log(row)

    def show(self, fields: dict[str, float]) -> None:
        """Update the progress display."""
        progress = self._session.progress
        self._display.update(step=progress.step, tokens=progress.tokens, seconds=progress.seconds, fields=fields)

    def say(self, text: str) -> None:
        """Print one line beside the progress display."""
        self._display.say(text)

    def samples(self, rows: Sequence[dict[str, str]]) -> None:
        """Keep text samples of this step."""
        step = self._session.progress.step
        self._run.write_sample(step, format_samples(rows))
        self._logger.log_samples(rows, step=step)

    def save(self, *, score: float | None) -> None:
        """Save a checkpoint in the background, after the rows it belongs to.

        A disk error is said and training goes on: the checkpoints of before are intact, and the next save may succeed.
        """
        self._metrics.sync()
        try:
            self._last_checkpoint = self._saver.wait() or self._last_checkpoint
        except CheckpointNotSaved as error:
            self.say(f"warning: {error}")
        self._saver.save(**self._session.checkpoint_arguments(), score=score)
        self.status("running")

    def bundle(self, arguments: dict[str, Any]) -> Path:
        """Save a replay bundle (the arguments of save_checkpoint) and return its folder. Raises UserError if the disk
        refuses it."""
        folder = self._run.path / "replay"
        try:
            folder.mkdir(exist_ok=True)
            return save_checkpoint(folder, **arguments)
        except OSError as error:
            raise UserError(f"the replay bundle could not be written to {folder}: {error}") from error

    def finish(self, state: str, *, reason: str) -> Path:
        """Wait for the last checkpoint, draw the plots, write the final status; return the checkpoint.

        A finished run's neural health is measured here, after training's clock has stopped and when all else is safe.
        Raises UserError if the last checkpoint could not be written.
        """
        try:
            self._last_checkpoint = self._saver.wait()
        except CheckpointNotSaved as error:
            raise UserError(str(error)) from error
        assert self._last_checkpoint is not None, "a run saves before it finishes"
        plots = plot_run(self._run.path)
        if state == "finished" and self._session.config.trainer.health_plots:
            plots += self._health_plots()
        self._logger.log_images({path.stem: path for path in plots}, step=self._session.progress.step)
        self.status(state, reason=reason)
        return self._last_checkpoint

    def _health_plots(self) -> list[Path]:
        """Pictures of neurons, memory and gradients on a little validation text, and their numbers."""
        session, data = self._session, self._session.config.data
        if session.world.strategy == FSDP:
            self.say("no health plots: FSDP leaves each process a part of the parameters; use scripts/diagnose.py")
            return []
        health = measure_health(session.model, session.corpus.validation, lanes=data.lanes, window=data.window)
        return draw_health(health, self._run.plots)

    def __enter__(self) -> Recorder:
        self._display.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                state = "failed" if isinstance(error, Exception) else "interrupted"  # a second Ctrl-C is no Exception
                self.status(state, reason=" ".join(f"{type(error).__name__}: {error}".split())[:300])
        finally:
            self._display.__exit__(kind, error, trace)
            self._metrics.close()
            self._logger.finish(self._finished_as)
            self._saver.close()


class SilentRecorder:
    """A recorder of a process that is not the first: it writes nothing, and hands over its part of what the first
    one saves."""

    def __init__(self, session: Session, run: RunDirectory) -> None:
        self._session = session
        self._run = run

    def row(self, metrics: dict[str, float]) -> None: ...

    def show(self, fields: dict[str, float]) -> None: ...

    def samples(self, rows: Sequence[dict[str, str]]) -> None: ...

    def say(self, text: str) -> None: ...

    def save(self, *, score: float | None) -> None:
        self._session.checkpoint_arguments()

    def bundle(self, arguments: dict[str, Any]) -> Path:
        return self._run.path / "replay"

    def finish(self, state: str, *, reason: str) -> Path:
        return self._run.checkpoints

    def __enter__(self) -> SilentRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None: ...
