"""Train a NeuroGen model.

    python scripts/train.py                                   # nano on Python's standard library
    python scripts/train.py model=small data=text data.path=notes.txt optimizer=muon trainer.max_steps=2000
    python scripts/train.py experiment=quick                  # a preset of conf/experiment
    python scripts/train.py resume=runs/20260101-120000-ab12  # go on where that run stopped
    python scripts/train.py run_dir=runs/mine resume=auto     # start, or go on if it was started before
    python scripts/train.py -m mode=unfused,fused optimizer.lr=1e-3,2e-3   # every combination: a sweep
    python scripts/train.py -m sweep=optuna 'optimizer.lr=tag(log,interval(1e-4,1e-2))'   # a search (conf/sweep)

Groups and their choices are the folders and files of conf/; every key can be set as group.key=value. A run directory
below runs/ gets the resolved configuration, metrics.jsonl, samples, plots, checkpoints and status.json. Ctrl-C saves
and says where (exit code 130), SIGTERM too (143).
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a traceback

from neurogen.config.continued import continue_config
from neurogen.config.script import run_script
from neurogen.sweep.run import is_sweep, run_sweep
from neurogen.training.run import train

if __name__ == "__main__":
    if is_sweep(sys.argv[1:]):
        sys.exit(run_sweep(__file__, sys.argv[1:]))
    sys.exit(run_script(train, prepare=continue_config))
