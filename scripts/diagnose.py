"""Show what each mode of the model costs on this machine, and what the brain does.

    python scripts/diagnose.py                                     # nano, all modes, 500 tokens: time, memory, copies
    python scripts/diagnose.py model=base mode=naive,unfused sequence=64
    python scripts/diagnose.py what=activity text=notes.txt        # firing rates, Go rate, half-lives, entropy, raster
    python scripts/diagnose.py what=tokenization                   # does text arrive as fast as the model reads it?

Prints tables and writes a JSON file and, but for tokenization, a plot to runs/diagnosis, or to out=<folder>. All
settings: neurogen/diagnosis/options.py.
"""

import os
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: its profiler warns of memory older than itself

from neurogen.diagnosis.options import parse_options
from neurogen.diagnosis.run import diagnose
from neurogen.errors import UserError

if __name__ == "__main__":
    try:
        diagnose(parse_options(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
