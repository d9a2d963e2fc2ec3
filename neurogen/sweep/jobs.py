"""One job of a sweep: a process of its own that runs scripts/train.py, and the record of how it ended.

sweep/
    <job>/       the job's run directory
    <job>.json   its record              <job>.log   what it printed
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neurogen.config.compose import compose_config, config_to_dict
from neurogen.errors import UserError
from neurogen.storage.files import write_atomically
from neurogen.training.run_directory import RunDirectory, config_fingerprint

FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
SAVED_AND_LEFT = (130, 143)  # exit codes of a run that a signal ended, see neurogen.training.signals


@dataclass
class Job:
    """A job and, once it ran, its outcome.

    Arguments:
        name: of its files; it says what was varied and ends in a hash of the whole configuration.
        folder: the sweep's directory.
        overrides: of scripts/train.py, less those that say where the run is kept.
        varied: the overrides that tell this job from the others.
        state: None before it ran, then finished, failed or interrupted.
        error: the last line of a failed job; traceback: its last lines.
    """

    name: str
    folder: str
    overrides: list[str]
    varied: dict[str, str] = field(default_factory=dict)
    state: str | None = None
    exit_code: int | None = None
    seconds: float = 0.0
    error: str = ""
    traceback: str = ""

    @property
    def run_dir(self) -> Path:
        return Path(self.folder) / self.name

    @property
    def log_path(self) -> Path:
        return Path(self.folder) / f"{self.name}.log"

    @property
    def record_path(self) -> Path:
        return Path(self.folder) / f"{self.name}.json"

    def command(self, script: str) -> list[str]:
        """The command line of the job; given again it continues the run."""
        return [sys.executable, script, *self.overrides, f"run_dir='{self.run_dir}'", "resume=auto"]

    def write(self) -> None:
        """Write the record."""
        write_atomically(self.record_path, json.dumps(asdict(self), indent=1).encode() + b"\n")

    def end(self, exit_code: int, seconds: float) -> None:
        """Note how the process ended, and write the record."""
        self.exit_code, self.seconds = exit_code, seconds
        self.state = FINISHED if exit_code == 0 else INTERRUPTED if exit_code in SAVED_AND_LEFT else FAILED
        if self.state == FAILED:
            lines = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
            start = max((i for i, line in enumerate(lines) if line.startswith("Traceback ")), default=len(lines) - 1)
            self.traceback = "\n".join(lines[max(start, 0) :][-200:])
            said = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
            self.error = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else said.strip()[:500]
        self.write()


def make_job(folder: Path, overrides: Sequence[str], varied: dict[str, str]) -> Job:
    """The job of `overrides`, composed once so that its name is its configuration's.

    A configuration that is refused makes a job that has failed already. A job that finished in an earlier call comes
    back finished.
    """
    try:
        config = config_to_dict(compose_config(overrides))
    except UserError as error:
        refused = Job(_job_name(varied, config_fingerprint({"overrides": list(overrides)})), str(folder), [*overrides])
        refused.varied, refused.state, refused.exit_code = varied, FAILED, 2
        refused.error = refused.traceback = f"error: {error}"
        return refused
    fingerprint = config_fingerprint(config)
    known = next(folder.glob(f"*-{fingerprint[:8]}.json"), None)  # whatever else was varied when it first ran
    name = _job_name(varied, fingerprint) if known is None else known.stem
    words = [*overrides]
    if config["logger"]["name"] == "wandb":
        words += [
            f"logger.{key}={value}"
            for key, value in (("group", f"'{folder.name}'"), ("run_name", f"'{name}'"))
            if config["logger"][key] is None
        ]
    job = Job(name, str(folder), words, varied)
    if _has_finished(job):
        record = json.loads(job.record_path.read_text())
        job.state, job.exit_code, job.seconds = FINISHED, 0, float(record["seconds"])
    return job


def read_job(folder: Path, name: str) -> Job | None:
    """The job of that name as its record has it, None if there is none that can be read."""
    try:
        record = json.loads((folder / f"{name}.json").read_text())
        return Job(**{**record, "name": name, "folder": str(folder)})
    except (OSError, ValueError, TypeError):
        return None


def _job_name(varied: dict[str, str], fingerprint: str) -> str:
    words = [f"{key.rpartition('.')[2]}={value}" for key, value in varied.items()]
    readable = re.sub(r"[^A-Za-z0-9=.,_+-]+", "_", ",".join(words))[:80]
    return f"{readable}-{fingerprint[:8]}" if readable else f"job-{fingerprint[:8]}"


def _has_finished(job: Job) -> bool:
    """Whether its record and its run directory both say so."""
    try:
        record: Any = json.loads(job.record_path.read_text())
        status = RunDirectory.view(job.run_dir).read_status()
    except (OSError, ValueError):  # a missing or damaged record, or no run: it is run again
        return False
    return isinstance(record, dict) and record.get("state") == FINISHED and status.get("state") == FINISHED


def run_job(
    job: Job,
    script: str,
    stopped: Callable[[], signal.Signals | None] = lambda: None,
    *,
    visible_gpu: str | None = None,
) -> Job:
    """Run a job in a process and wait; return it with its outcome, which is on disk as well.

    stopped: the signal that asks for the end, or None; it is passed on once, so that the run saves and leaves.
    visible_gpu: the only one that the process sees; None for all that this one sees.
    """
    environment = os.environ if visible_gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": visible_gpu}
    began = time.perf_counter()
    passed_on = False
    with job.log_path.open("wb") as log:
        # A session of its own: the terminal's Ctrl-C reaches it by us alone, once.
        process = subprocess.Popen(
            job.command(script),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment,
        )
        while True:
            try:
                exit_code = process.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                number = stopped()
                if number is not None and not passed_on:
                    process.send_signal(number)
                    passed_on = True
    job.end(exit_code, time.perf_counter() - began)
    return job
