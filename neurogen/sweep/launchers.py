"""Where jobs run: processes here, or SLURM through submitit."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from neurogen.errors import UserError
from neurogen.sweep.config import LocalConfig, SlurmConfig
from neurogen.sweep.jobs import FAILED, INTERRUPTED, Job, run_job
from neurogen.training.signals import StopRequest

Launcher = Callable[[Sequence[Job], Callable[[Job], None]], None]


def make_launcher(config: LocalConfig | SlurmConfig, *, script: str, folder: Path, stop: StopRequest) -> Launcher:
    """A function that runs jobs to their ends, telling the second argument of each that ended.

    Raises UserError if submitit is wanted and missing.
    """
    if isinstance(config, LocalConfig):
        return lambda jobs, ended: _run_here(jobs, ended, script=script, at_once=config.at_once, stop=stop)
    executor = make_executor(config, folder)
    return lambda jobs, ended: _run_there(jobs, ended, script=script, executor=executor)


def _run_here(
    jobs: Sequence[Job], ended: Callable[[Job], None], *, script: str, at_once: int, stop: StopRequest
) -> None:
    def asked() -> signal.Signals | None:
        return signal.Signals[stop.name] if stop.name is not None else None

    places: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # one a running job
    for place in deal_gpus(at_once):
        places.put(place)

    def run(job: Job) -> Job:
        if stop.requested:
            job.state = INTERRUPTED
            return job
        place = places.get()
        try:
            return run_job(job, script, asked, visible_gpu=place)
        finally:
            places.put(place)

    with ThreadPoolExecutor(at_once) as pool:
        for done in as_completed([pool.submit(run, job) for job in jobs]):
            ended(done.result())


def deal_gpus(at_once: int) -> list[str | None]:
    """The GPU that each of `at_once` jobs running together sees, in turns over those that this process sees; None, and
    so the first of them, where a job runs alone or there is no choice."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(torch.cuda.device_count())] if named is None else [x for x in named.split(",") if x]
    if at_once == 1 or len(gpus) < 2:
        return [None] * at_once
    return [gpus[i % len(gpus)] for i in range(at_once)]


def make_executor(config: SlurmConfig, folder: Path) -> Any:
    """submitit's executor for `config`, its files below `folder`. Raises UserError if submitit is missing."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("launcher=slurm: needs submitit; pip install 'neurogen[sweep]'") from error
    try:
        executor = submitit.AutoExecutor(folder=folder / "submitit" / "%j", cluster=config.cluster)
    except RuntimeError as error:  # submitit looks for srun
        raise UserError(f"launcher=slurm: {error}; start the sweep where SLURM is, or use launcher=local") from error
    executor.update_parameters(
        name="neurogen",
        timeout_min=config.timeout_minutes,
        gpus_per_node=config.gpus_per_node,
        cpus_per_task=config.cpus_per_task,
        mem_gb=config.memory_gb,
        slurm_array_parallelism=config.at_once,
        slurm_partition=config.partition,
        slurm_account=config.account,
        slurm_qos=config.qos,
    )
    return executor


def _run_there(jobs: Sequence[Job], ended: Callable[[Job], None], *, script: str, executor: Any) -> None:
    with executor.batch():
        tasks = [executor.submit(run_job, job, script) for job in jobs]
    for job, task in zip(jobs, tasks):
        error = task.exception()  # waits
        if error is None:
            finished = task.result()
            job.state, job.exit_code, job.seconds = finished.state, finished.exit_code, finished.seconds
            job.error, job.traceback = finished.error, finished.traceback
        else:  # the machine or the scheduler ended it
            job.state, job.error, job.traceback = FAILED, str(error).splitlines()[-1][:500], str(error)
            job.write()
        ended(job)
