"""Make tables and pictures from result files of scripts/benchmark.py, and put the short ones into a document.

    python scripts/report_benchmarks.py docs/benchmarks/{kernels,training}.json --into docs/BENCHMARKS.md

Each file x.json becomes x.md (every provider) and x.png beside it; `--into` puts a line for each op, ours and the
quickest of the others, between the lines `<!-- x -->` and `<!-- /x -->` of a document.
"""

import argparse
import os
import sys
from pathlib import Path

from neurogen.benchmark.report import markdown, plot, summary
from neurogen.errors import UserError
from neurogen.storage.files import write_atomically
from neurogen.training.comparison import insert_section


def main(arguments: list[str] | None = None) -> int:
    """Report on the files named; return the exit code."""
    parser = argparse.ArgumentParser(description="Tables and pictures from result files of scripts/benchmark.py.")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, default=None, help="a document that shows them")
    chosen = parser.parse_args(arguments)
    try:
        for result in chosen.results:
            if not result.is_file():
                raise UserError(f"no result file at {result}; scripts/benchmark.py makes one")
            write_atomically(result.with_suffix(".md"), markdown(result).encode())
            picture = result.with_suffix(".png")
            plot(result, picture)
            if chosen.into is not None:
                shown = Path(os.path.relpath(picture, chosen.into.parent)).as_posix()
                details = Path(os.path.relpath(result.with_suffix(".md"), chosen.into.parent)).as_posix()
                text = f"{summary(result)}\n[All of them]({details}).\n\n![{result.stem}]({shown})\n"
                document = insert_section(chosen.into.read_text(encoding="utf-8"), result.stem, text)
                write_atomically(chosen.into, document.encode())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
