"""What `sweep=` and `launcher=` take: conf/sweep.yaml and its two groups."""

from __future__ import annotations

from dataclasses import dataclass

from neurogen.config.checks import in_range, one_of


@dataclass
class GridConfig:
    """Every combination of the values on the command line.

    dir: where the jobs and the summary are kept; None for runs/sweep-<hash of the command line>, so that the same
    command finds its finished jobs again.
    """

    name: str = "grid"
    dir: str | None = None


@dataclass
class OptunaConfig:
    """A search by Optuna (tree-structured Parzen estimator) for the lowest or highest final value of a metric.

    num_trials: of the whole study, those of earlier calls included.
    at_once: how many trials are proposed together; more than one only pays with a launcher that runs them together.
    """

    name: str = "optuna"
    dir: str | None = None
    num_trials: int = 20
    metric: str = "val/bpb"
    direction: str = "minimize"
    at_once: int = 1
    num_random: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        in_range("num_trials", self.num_trials, least=1)
        in_range("at_once", self.at_once, least=1)
        in_range("num_random", self.num_random, least=1)
        in_range("seed", self.seed, least=0)
        one_of("direction", self.direction, ("minimize", "maximize"))


@dataclass
class LocalConfig:
    """Jobs as processes of this machine, `at_once` of them together; with several GPUs each job sees one, in turns."""

    name: str = "local"
    at_once: int = 1

    def __post_init__(self) -> None:
        in_range("at_once", self.at_once, least=1)


@dataclass
class SlurmConfig:
    """Jobs handed to SLURM by submitit; `cluster=local` makes submitit start them here instead, to try it out.

    folder: submitit's own files, below the sweep's folder; submitit pickles its tasks there, NeuroGen nothing.
    """

    name: str = "slurm"
    cluster: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    timeout_minutes: int = 240
    gpus_per_node: int = 1
    cpus_per_task: int = 8
    memory_gb: int | None = None
    at_once: int = 64

    def __post_init__(self) -> None:
        one_of("cluster", self.cluster, ("slurm", "local"))
        for key in ("timeout_minutes", "cpus_per_task", "at_once"):
            in_range(key, getattr(self, key), least=1)
        in_range("gpus_per_node", self.gpus_per_node, least=0)


@dataclass
class SweepConfig:
    """How the jobs are chosen and where they run."""

    sweep: GridConfig | OptunaConfig
    launcher: LocalConfig | SlurmConfig
