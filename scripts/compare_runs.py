"""Compare runs from their metrics.jsonl: a Markdown table on standard output, rows and curves as files.

    python scripts/compare_runs.py runs/a runs/b runs/c          # the table, and comparison.png
    python scripts/compare_runs.py runs/* --name bytes           # docs/benchmarks/bytes.md, .json, .png and .svg
    python scripts/compare_runs.py runs/* --name bytes --into docs/BENCHMARKS.md
    python scripts/compare_runs.py runs/* --differences           # and how far apart their curves are

Runs that differ in their seed alone share a row (mean ± standard deviation over seeds) and a colour. `--into` puts
table and picture between the lines `<!-- bytes -->` and `<!-- /bytes -->` of a document.
"""

import argparse
import os
import sys
from pathlib import Path

from neurogen.errors import UserError
from neurogen.storage.files import write_atomically
from neurogen.training.comparison import (
    comparison_table,
    curve_differences,
    insert_section,
    plot_comparison,
    read_run,
    write_comparison,
)


def main(arguments: list[str] | None = None) -> int:
    """Compare the runs named; return the exit code."""
    parser = argparse.ArgumentParser(description="Compare runs from their metrics.jsonl.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--name", default=None, help="write table, rows and curves under this name")
    parser.add_argument("--folder", type=Path, default=Path("docs/benchmarks"), help="where those go")
    parser.add_argument("--into", type=Path, default=None, help="a document that shows them, with --name")
    parser.add_argument("--png", type=Path, default=Path("comparison.png"), help="where the curves go without --name")
    parser.add_argument("--differences", action="store_true", help="of runs that differ in one setting alone")
    chosen = parser.parse_args(arguments)
    try:
        runs = [read_run(path) for path in chosen.runs]
        if chosen.name is None:
            if chosen.into is not None:
                raise UserError("--into: needs --name, the name of the place in the document")
            print(comparison_table(runs), end="")
            if chosen.differences:
                print(f"\n{curve_differences(runs)}", end="")
            plot_comparison(runs, chosen.png)
            print(chosen.png, file=sys.stderr)
            return 0
        more = [curve_differences(runs)] if chosen.differences else []
        table = "\n".join([write_comparison(runs, chosen.folder, chosen.name), *more])
        print(table, end="")
        if chosen.into is not None:
            _insert(chosen.into, chosen.name, table, chosen.folder / f"{chosen.name}.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _insert(path: Path, name: str, table: str, picture: Path) -> None:
    try:
        document = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--into {path}: cannot be read ({error.strerror})") from error
    shown = Path(os.path.relpath(picture, path.parent)).as_posix()
    write_atomically(path, insert_section(document, name, f"{table}\n![{name}]({shown})\n").encode())


if __name__ == "__main__":
    sys.exit(main())
