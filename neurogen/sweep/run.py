"""A whole sweep, from the command line of scripts/train.py -m to its exit code."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from neurogen.config.compose import build_config, compose_node
from neurogen.config.script import USER_ERROR_EXIT_CODE
from neurogen.errors import UserError
from neurogen.sweep.config import OptunaConfig, SweepConfig
from neurogen.sweep.jobs import FAILED, FINISHED, Job, make_job, read_job
from neurogen.sweep.launchers import Launcher, make_launcher
from neurogen.sweep.search import search
from neurogen.sweep.space import Space
from neurogen.sweep.summary import job_rows, last_value, write_summary
from neurogen.training.lock import RunLock
from neurogen.training.signals import StopRequest

FLAGS = ("-m", "--multirun")
OWN_GROUPS = ("sweep", "launcher")


def is_sweep(words: Sequence[str]) -> bool:
    """Whether a command line asks for a sweep."""
    return any(word in FLAGS or word.partition("=")[0] == "sweep" for word in words)


def run_sweep(script: str, words: Sequence[str]) -> int:
    """Run all jobs of a command line of `script`; return 0, 1 if a job failed, 2 after `error: ...`, or 130 or 143
    after a signal (running jobs saved and left; the same command continues them)."""
    try:
        return _run_sweep(os.path.abspath(script), [word for word in words if word not in FLAGS])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE


def _run_sweep(script: str, words: Sequence[str]) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("-m: a sweep starts its own processes; leave torchrun out")
    own = [word for word in words if word.partition("=")[0].partition(".")[0] in OWN_GROUPS]
    theirs = [word for word in words if word not in own]
    config = build_config(compose_node(own, config_name="sweep"), SweepConfig)
    space = Space.parse(theirs)
    folder = Path(config.sweep.dir or _default_folder(config.sweep.name, theirs))
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder / "lock")
    try:
        with StopRequest() as stop:
            launcher = make_launcher(config.launcher, script=script, folder=folder, stop=stop)
            sweep = _Sweep(folder, space, launcher)
            metric, direction = "val/bpb", "minimize"
            if isinstance(config.sweep, OptunaConfig):
                metric, direction = config.sweep.metric, config.sweep.direction
                search(
                    config.sweep,
                    space,
                    folder,
                    launch=sweep.launch,
                    recall=sweep.recall,
                    score=lambda job: last_value(job_rows(job), metric),
                )
            else:
                sweep.launch(list(space.grid()))
            path = write_summary(folder, list(sweep.jobs.values()), metric=metric, direction=direction)
            states = [job.state for job in sweep.jobs.values()]
            print(f"{states.count(FINISHED)} of {len(states)} jobs finished; summary: {path}", file=sys.stderr)
            return stop.exit_code or int(FAILED in states)
    finally:
        lock.release()


def _default_folder(kind: str, words: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([kind, sorted(words)]).encode()).hexdigest()
    return f"runs/sweep-{digest[:8]}"


class _Sweep:
    """The jobs of a sweep so far, by name."""

    def __init__(self, folder: Path, space: Space, launcher: Launcher) -> None:
        self.jobs: dict[str, Job] = {}
        self._folder = folder
        self._space = space
        self._launcher = launcher

    def launch(self, settings: Sequence[dict[str, str]]) -> list[Job]:
        """Run the jobs of these settings, except what finished before, and return all of them, ended."""
        made = [self._make(varied) for varied in settings]
        if not self.jobs and made and all(job.exit_code == 2 for job in made):
            raise UserError(made[0].error.removeprefix("error: "))  # a mistake in what they share: nothing is started
        self.jobs |= {job.name: job for job in made}
        todo = {job.name: job for job in made if job.state is None}
        for job in made:
            if job.state is not None:
                self._say(job, "already finished" if job.state == FINISHED else f"failed: {job.error}")
                if job.state == FAILED:
                    job.write()
        self._launcher(list(todo.values()), self._ended)
        return [self.jobs[job.name] for job in made]

    def recall(self, names: Sequence[str]) -> None:
        """Count jobs that ended in earlier calls among these, for the summary."""
        for name in names:
            job = read_job(self._folder, name)
            if job is not None:
                self.jobs[name] = job

    def _make(self, varied: dict[str, str]) -> Job:
        return make_job(self._folder, [*self._space.fixed, *(f"{k}={v}" for k, v in varied.items())], varied)

    def _ended(self, job: Job) -> None:
        value = last_value(job_rows(job), "val/bpb")
        score = "" if value is None else f", val/bpb {value:.4f}"
        error = f": {job.error}" if job.error else ""
        self._say(job, f"{job.state} after {job.seconds:.0f} s{score}{error}")

    def _say(self, job: Job, text: str) -> None:
        number = list(self.jobs).index(job.name) + 1
        print(f"[{number}/{len(self.jobs)}] {job.name} {text}", file=sys.stderr, flush=True)
