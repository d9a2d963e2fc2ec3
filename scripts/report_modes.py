"""Turn a result of scripts/diagnose.py into the table of README.md: every mode beside the system this one grew from.

python scripts/diagnose.py model=base
python scripts/report_modes.py result=runs/diagnosis/modes-base.json            # task=train, or task=generate
"""

import sys

from neurogen.config.script import run_script
from neurogen.diagnosis.comparison import comparison, load_result
from neurogen.diagnosis.options import ReportOptions


def main(options: ReportOptions) -> None:
    print(comparison(load_result(options.result), options.task), end="")


if __name__ == "__main__":
    sys.exit(run_script(main, config_name="report_modes", root=ReportOptions, verbatim=("result",)))
