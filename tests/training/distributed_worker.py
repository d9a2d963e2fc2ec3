"""One of two processes of tests/training/test_distributed.py: several runs, one process group after the other.

The run named signal gets a SIGTERM in its first step, in the second process only; the one named sharded_rest continues
a copy of sharded_half.

Arguments: a folder to work in, and for each run a port and the file of its overrides (a JSON list).
"""

import json
import os
import shutil
import signal
import sys
import traceback

import torch

import neurogen.training.recorder as recorder
from neurogen.config.compose import compose_config
from neurogen.errors import UserError
from neurogen.training.run import train
from neurogen.training.update import Update

call = Update.__call__


def signalled(self, *args):
    os.kill(os.getpid(), signal.SIGTERM)
    Update.__call__ = call
    return call(self, *args)


torch.set_num_threads(1)
recorder.plot_run = lambda path: []
os.chdir(sys.argv[1])
for job in sys.argv[2:]:
    port, _, name = job.partition(":")
    os.environ["MASTER_PORT"] = port
    with open(f"{name}.json") as file:
        overrides = json.load(file)
    if name == "signal" and os.environ["RANK"] == "1":
        Update.__call__ = signalled
    if name == "sharded_rest" and os.environ["RANK"] == "0":
        shutil.copytree("sharded_half", "sharded_copy")
    try:
        code = train(compose_config(overrides))
        outcome = f"code {code}"
    except UserError as error:
        outcome = f"error: {error}"
    except Exception:
        outcome = traceback.format_exc()
    with open(f"{name}.{os.environ['RANK']}.outcome", "w") as file:
        file.write(outcome)
    if outcome.startswith("Traceback"):
        print(f"{name}: {outcome}")
        sys.exit(1)
