"""Optuna's ask and tell over jobs, kept in a SQLite file so that a search goes on where it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neurogen.errors import UserError
from neurogen.sweep.config import OptunaConfig
from neurogen.sweep.jobs import FAILED, FINISHED, Job
from neurogen.sweep.space import Space

STUDY = "neurogen"
JOB = "job"  # a trial's attribute, set once its job has ended


def search(
    config: OptunaConfig,
    space: Space,
    folder: Path,
    *,
    launch: Callable[[list[dict[str, str]]], list[Job]],
    recall: Callable[[list[str]], None],
    score: Callable[[Job], float | None],
) -> None:
    """Propose, run and learn until the study has `num_trials` trials that ended.

    Arguments:
        launch: runs the jobs of these settings and returns them, ended.
        recall: is told the names of the jobs that ended in earlier calls.
        score: a finished job's metric, None if it has none.

    A trial that a stop cut short is run again by the next call. Raises UserError if Optuna is missing or the study in
    the folder searches another space.
    """
    optuna = _optuna()
    study = _open_study(optuna, config, space, folder)
    distributions = space.distributions()
    state = optuna.trial.TrialState
    for trial in study.get_trials(states=(state.RUNNING,)):  # of a process that is gone
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=state.FAIL)
    recall([trial.user_attrs[JOB] for trial in _ended(study, state)])
    while (remaining := config.num_trials - len(_ended(study, state))) > 0:
        trials = [study.ask(distributions) for _ in range(min(config.at_once, remaining))]
        jobs = launch([{key: str(value) for key, value in trial.params.items()} for trial in trials])
        stopped = False
        for trial, job in zip(trials, jobs):
            value = score(job) if job.state == FINISHED else None
            if job.state not in (FINISHED, FAILED):
                stopped = True  # left running, so that the next call repeats it
                continue
            trial.set_user_attr(JOB, job.name)
            study.tell(trial, value, state=None if value is not None else state.FAIL)
        if stopped:
            return


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("sweep=optuna: needs Optuna; pip install 'neurogen[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _ended(study: Any, state: Any) -> list[Any]:
    """The trials whose jobs have ended."""
    ended = study.get_trials(deepcopy=False, states=(state.COMPLETE, state.FAIL))
    return [trial for trial in ended if JOB in trial.user_attrs]


def _open_study(optuna: Any, config: OptunaConfig, space: Space, folder: Path) -> Any:
    storage = f"sqlite:///{(folder / 'optuna.db').absolute()}"
    known = {study.study_name: study for study in optuna.get_all_study_summaries(storage)}
    # Every call draws from a seed of its own: a sampler that starts again from the first would repeat its proposals.
    earlier = known[STUDY].n_trials if STUDY in known else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=config.num_random,
            seed=(config.seed * 1_000_003 + earlier) % 2**32,
            constant_liar=config.at_once > 1,
        )
    study = optuna.create_study(
        storage=storage, study_name=STUDY, direction=config.direction, sampler=sampler, load_if_exists=True
    )
    asked = {**{k: "|".join(v) for k, v in space.choices.items()}, **{k: str(v) for k, v in space.intervals.items()}}
    if study.user_attrs.get("space", asked) != asked or study.direction.name.lower() != config.direction:
        raise UserError(f"{folder}: its study searches another space or direction; choose another sweep.dir")
    study.set_user_attr("space", asked)
    return study
