"""Turn a result of scripts/diagnose.py into the table of README.md: every mode beside the system this one grew from.

python scripts/diagnose.py model=base precision=bf16 task=train vocab_size=50257 out=docs/benchmarks
python scripts/report_modes.py result=docs/benchmarks/modes-base.json into=README.md    # or task=generate; or printed
"""

import sys
from pathlib import Path

from neurogen.config.script import run_script
from neurogen.diagnosis.comparison import comparison, load_result
from neurogen.diagnosis.options import ReportOptions
from neurogen.errors import UserError
from neurogen.storage.files import write_atomically
from neurogen.training.comparison import insert_section


def main(options: ReportOptions) -> None:
    table = comparison(load_result(options.result), options.task)
    if not options.into:
        print(table, end="")
        return
    document = Path(options.into)
    if not document.is_file():
        raise UserError(f"into={document}: there is no such file")
    write_atomically(document, insert_section(document.read_text(encoding="utf-8"), "modes", table).encode())


if __name__ == "__main__":
    sys.exit(run_script(main, config_name="report_modes", root=ReportOptions, verbatim=("result", "into")))
