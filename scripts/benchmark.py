"""Time our kernels, train steps and replies against their references and against peers, on this machine.

    python scripts/benchmark.py suite=kernels                  # docs/benchmarks/kernels.json
    python scripts/benchmark.py suite=training device=cuda
    python scripts/benchmark.py suite=generation 'only="base, context 128, batch 1,"'
    python scripts/benchmark.py suite=kernels 'only=cortex|relay' 'provider=neurogen|cuDNN' seconds=3
    python scripts/benchmark.py suite=kernels size=test device=cpu output=results.json    # tries the suite itself

Each contender is checked where it computes our function, warmed up, and then takes turns with the others; a peer that
is not installed or cannot run is listed with its error. `pip install -e .[bench]` brings the peers.
"""

import sys
from pathlib import Path

import torch

from neurogen.benchmark import Row, compare, write_rows
from neurogen.benchmark import generation as generation_suite
from neurogen.benchmark import kernels as kernel_suite
from neurogen.benchmark import training as training_suite
from neurogen.benchmark.config import BenchmarkConfig
from neurogen.benchmark.report import markdown, plot
from neurogen.config.script import run_script
from neurogen.errors import UserError

SUITES = {"kernels": kernel_suite.cases, "training": training_suite.cases, "generation": generation_suite.cases}


def describe(row: Row) -> str:
    if row.median is None:
        return str(row.failure)
    return f"{row.median * 1e3:10.3f} ms  " + "  ".join(f"{name} {value:,.4g}" for name, value in row.extra.items())


def matches(wanted: str | None, name: str) -> bool:
    """Whether one of the parts, with | between them, is in the name; without any, yes."""
    return not wanted or any(part in name for part in wanted.split("|"))


def main(config: BenchmarkConfig) -> None:
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device is cuda and this machine has none; use device=cpu size=test to try the suite")
    if name == "cpu" and config.size == "full":
        raise UserError("size=full needs a GPU; use size=test to try the suite on the CPU")
    output = Path(config.output or f"docs/benchmarks/{config.suite}.json")
    torch.manual_seed(0)
    for case in SUITES[config.suite](small=config.size == "test"):
        if not matches(config.only, case.op):
            continue
        contenders = [contender for contender in case.contenders if matches(config.provider, contender.provider)]
        if not contenders:
            continue
        rows = compare(
            config.suite,
            case.op,
            contenders,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            device=torch.device(name),
            seconds=config.seconds,
            extra=case.extra,
            cold=case.cold,
            min_rounds=case.min_rounds,
            record=case.record,
        )
        write_rows(output, rows)
        for row in rows:
            print(f"{case.op:32s} {case.shape}  {row.provider:45s} {describe(row)}", flush=True)
        if name != "cpu":
            torch.cuda.empty_cache()
    if output.is_file():
        output.with_suffix(".md").write_text(markdown(output))
        plot(output, output.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(run_script(main, config_name="benchmark", root=BenchmarkConfig))
