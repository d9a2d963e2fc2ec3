"""Show what each mode of the model costs on this machine, and what the brain does.

    python scripts/diagnose.py                                     # nano, all modes, 500 tokens: time, memory, copies
    python scripts/diagnose.py model=base mode=naive,unfused sequence=64
    python scripts/diagnose.py what=activity text=notes.txt        # firing rates, Go rate, half-lives, entropy, raster
    python scripts/diagnose.py what=activity checkpoint=runs/20260101-120000-ab12
    python scripts/diagnose.py what=health checkpoint=runs/...    # memory horizon, gradient against lag, time constants
    python scripts/diagnose.py what=tokenization                   # does text arrive as fast as the model reads it?

Prints tables and writes a JSON file and, but for tokenization, a plot to runs/diagnosis, or to out=<folder>. All
settings: conf/diagnose.yaml.
"""

import os
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: its profiler warns of memory older than itself

from neurogen.config.script import run_script
from neurogen.diagnosis.options import VERBATIM, Options, name_model
from neurogen.diagnosis.run import diagnose


def main(options: Options) -> None:
    diagnose(options)


if __name__ == "__main__":
    sys.exit(run_script(main, config_name="diagnose", root=Options, verbatim=VERBATIM, prepare=name_model))
