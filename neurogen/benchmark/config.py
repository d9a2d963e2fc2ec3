"""What scripts/benchmark.py takes."""

from __future__ import annotations

from dataclasses import dataclass

from neurogen.config.checks import in_range, one_of


@dataclass
class BenchmarkConfig:
    """Which suite runs, how large and where to.

    suite: `kernels`, `training` or `generation`.
    size: `full` (the published shapes, on a GPU) or `test` (tiny, anywhere).
    only: part of an op's name, or several with | between them; null for all.
    provider: part of a provider's name, or several likewise; null for all.
    seconds: of timing for each contender.
    output: a result file; null for docs/benchmarks/<suite>.json.
    """

    suite: str
    size: str = "full"
    only: str | None = None
    provider: str | None = None
    seconds: float = 1.0
    device: str = "auto"
    output: str | None = None

    def __post_init__(self) -> None:
        one_of("suite", self.suite, ("kernels", "training", "generation"))
        one_of("size", self.size, ("full", "test"))
        in_range("seconds", self.seconds, least=0)
