"""Turn a result of scripts/diagnose.py into the table of README.md: every mode beside the system this one grew from.

python scripts/diagnose.py model=base
python scripts/report_modes.py runs/diagnosis/modes-base.json            # train; or generate as a second word
"""

import sys

from neurogen.diagnosis.comparison import comparison, load_result
from neurogen.errors import UserError

if __name__ == "__main__":
    try:
        if len(sys.argv) not in (2, 3):
            raise UserError("give the result file of scripts/diagnose.py and, if not train, the task")
        print(comparison(load_result(sys.argv[1]), *sys.argv[2:]), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
