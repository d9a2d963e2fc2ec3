"""Compare runs from their metrics.jsonl: a Markdown table on standard output, and curves as a PNG.

    python scripts/compare_runs.py runs/a runs/b runs/c
    python scripts/compare_runs.py runs/* --png docs/comparison.png --table docs/comparison.md

Runs that differ in their seed alone share a row (mean ± standard deviation over seeds) and a colour.
"""

import argparse
import sys
from pathlib import Path

from neurogen.errors import UserError
from neurogen.training.comparison import comparison_table, plot_comparison, read_run


def main(arguments: list[str] | None = None) -> int:
    """Compare the runs named; return the exit code."""
    parser = argparse.ArgumentParser(description="Compare runs from their metrics.jsonl.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--png", type=Path, default=Path("comparison.png"), help="where the curves go")
    parser.add_argument("--table", type=Path, default=None, help="write the table there as well")
    chosen = parser.parse_args(arguments)
    try:
        runs = [read_run(path) for path in chosen.runs]
        table = comparison_table(runs)
        print(table, end="")
        if chosen.table is not None:
            chosen.table.parent.mkdir(parents=True, exist_ok=True)
            chosen.table.write_text(table, encoding="utf-8")
        print(plot_comparison(runs, chosen.png), file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
