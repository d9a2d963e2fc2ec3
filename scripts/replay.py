"""Run the step again that stopped a run, and name the first operation whose result was not finite.

    python scripts/replay.py bundle=runs/20260101-120000-ab12/replay/step-00000123
    python scripts/replay.py bundle=... device=cpu dtype=float64     # does it go away with more precision?

A run leaves a bundle when too many steps in a row had to be skipped (trainer.max_skipped_in_a_row).
"""

import sys

from neurogen.config.script import run_script
from neurogen.config.script_configs import ReplayConfig
from neurogen.training.replay import replay


def main(config: ReplayConfig) -> None:
    for line in replay(config.bundle, mode=config.mode, device=config.device, dtype=config.dtype):
        print(line)


if __name__ == "__main__":
    sys.exit(run_script(main, config_name="replay", root=ReplayConfig, verbatim=("bundle",)))
