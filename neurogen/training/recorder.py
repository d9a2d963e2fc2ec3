"""What a run leaves behind: rows of metrics, samples, checkpoints, plots and a status, in its directory and at its
logger."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurogen.config.compose import config_to_dict
from neurogen.data.prefetch import Prefetcher
from neurogen.diagnosis.health import measure_health
from neurogen.diagnosis.health_plots import draw_health
from neurogen.errors import UserError
from neurogen.training.checkpoint import CheckpointNotSaved, find_latest, save_checkpoint
from neurogen.training.checkpoint_saver import AsyncCheckpointSaver
from neurogen.training.distributed import FSDP
from neurogen.training.loggers import Logger
from neurogen.training.metrics import MetricsWriter
from neurogen.training.plots import plot_run
from neurogen.training.progress import Progress as ProgressDisplay
from neurogen.training.run_directory import RunDirectory
from neurogen.training.samples import format_samples
from neurogen.training.signals import StopRequest

if TYPE_CHECKING:
    from neurogen.training.session import Session


STOP = "stop"


class Recorder:
    """One run's output; a context that ends the logger, the metrics file and the checkpoint thread.

    A disk that refuses a file does not end the run in the middle of a step: see `DiskFailures`.

    Arguments:
        session: what is recorded.
        run: the directory, already locked.
        logger: mirrors metrics and samples.
        display: the progress bar or lines.
        resumed: whether the session continues from its progress; rows after it are cut.
        stop: asked for the end where trainer.on_save_failure says so.
    """

    def __init__(
        self,
        session: Session,
        run: RunDirectory,
        logger: Logger,
        display: ProgressDisplay,
        *,
        resumed: bool,
        stop: StopRequest,
    ) -> None:
        trainer = session.config.trainer
        self._session = session
        self._run = run
        self._logger = logger
        self._display = display
        self._metrics = MetricsWriter(run.metrics_path, resume_step=session.progress.step if resumed else None)
        self._saver = AsyncCheckpointSaver(run.checkpoints, keep_last=trainer.keep_last, keep_best=trainer.keep_best)
        self._disk = DiskFailures(trainer.on_save_failure, say=self.say, stop=stop)
        self._unwritten: list[tuple[dict[str, float], dict[str, Any]]] = []
        self._waited = (0.0, session.progress.seconds)
        self._last_checkpoint: Path | None = None
        self._finished_as = "failed"
        logger.start(config=config_to_dict(session.config), run_dir=run.path)
        self.status("running")

    def status(self, state: str, *, reason: str = "") -> None:
        """Write status.json; the last state written is what the logger ends with."""
        progress = self._session.progress
        self._finished_as = state if state != "running" else "failed"
        with self._disk.tolerated("status.json"):
            self._run.write_status(
                state,
                step=progress.step,
                tokens=progress.tokens,
                seconds=progress.seconds,
                reason=reason,
                last_checkpoint=self._last_checkpoint,
            )

    def row(self, metrics: dict[str, float]) -> None:
        """Write the one row of this step. A row that the disk refuses is kept and written before the next one."""
        self._collect(self._saver.poll)
        progress = self._session.progress
        metrics = metrics | self._wait_share() | {"disk/failures": float(self._disk.num_failures)}
        place = {"step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds}
        self._unwritten.append((metrics, place))
        self._write_rows()
        self._logger.log({**place, **metrics})

    def _write_rows(self, *, then: Callable[[], None] = lambda: None) -> None:
        with self._disk.tolerated("metrics.jsonl"):
            while self._unwritten:
                metrics, place = self._unwritten[0]
                self._metrics.write(metrics, **place)
                self._unwritten.pop(0)
            then()

    def _wait_share(self) -> dict[str, float]:
        """data/wait_share: how much of the time since the last row the step stood waiting for data."""
        batches, seconds = self._session.batches, self._session.progress.seconds
        if not isinstance(batches, Prefetcher):
            return {}
        (before, since), self._waited = self._waited, (batches.wait_seconds, seconds)
        return {"data/wait_share": (self._waited[0] - before) / (seconds - since)} if seconds > since else {}

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
        with self._disk.tolerated("a sample"):
            self._run.write_sample(step, format_samples(rows))
        self._logger.log_samples(rows, step=step)

    def save(self, *, score: float | None) -> None:
        """Save a checkpoint in the background, after the rows it belongs to.

        That it failed is known later, by the next row or save: the checkpoints of before are intact.
        """
        self._collect(self._saver.wait)
        self._write_rows(then=self._metrics.sync)
        self._saver.save(**self._session.checkpoint_arguments(), score=score)
        self.status("running")

    def _collect(self, ask: Callable[[], Path | None]) -> None:
        """Note how a save in the background ended."""
        with self._disk.tolerated("a checkpoint"):
            self._last_checkpoint = ask() or self._last_checkpoint

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
            good = self._last_checkpoint or find_latest(self._run.checkpoints)
            held = f"{good} is the last good one" if good else "there is none before it"
            raise UserError(f"{error.reason}; {held}: free some space, then resume={self._run.path}") from error
        assert self._last_checkpoint is not None, "a run saves before it finishes"
        with self._disk.tolerated("a plot"):
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
            self._write_rows()
            with self._disk.tolerated("metrics.jsonl"):
                self._metrics.close()
            self._logger.finish(self._finished_as)
            with self._disk.tolerated("a checkpoint"):
                self._saver.close()


class DiskFailures:
    """What a run does where the disk refuses one of its files: count it, say so, and go on or ask for the end.

    Nothing that was whole before is lost either way: checkpoints, status and samples are replaced as a whole or not at
    all, and a row of metrics is taken back. Asking for the end is what a signal does, so that several processes stop at
    the same step; the run then tries once more to save.

    Arguments:
        policy: trainer.on_save_failure, `stop` or `continue`.
        say: prints a line.
        stop: what is asked for the end.
    """

    def __init__(self, policy: str, *, say: Callable[[str], None], stop: StopRequest) -> None:
        self.num_failures = 0
        self._policy = policy
        self._say = say
        self._stop = stop
        self._said: dict[str, str] = {}

    @contextlib.contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """Around the writing of one file. The same failure of the same thing is said once until it succeeds again."""
        try:
            yield
        except OSError as error:
            self.num_failures += 1
            saved = isinstance(error, CheckpointNotSaved)
            line = error.reason if isinstance(error, CheckpointNotSaved) else f"{what} not written: {error.strerror}"
            if saved or self._said.get(what) != line:
                self._say(f"warning: {line} (failure {self.num_failures} of the disk)")
            self._said[what] = line
            if self._policy == STOP:
                self._stop.ask("notice of a failed save (trainer.on_save_failure=stop)")
        else:
            self._said.pop(what, None)


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
