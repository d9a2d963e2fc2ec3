"""One of two processes of tests/training/test_distributed.py: several runs, one process group after the other.

Arguments: a folder to work in, and for each run a port and the file of its overrides (a JSON list).
"""

import json
import os
import sys
import traceback

import torch

import neurogen.training.recorder as recorder
from neurogen.config.compose import compose_config
from neurogen.errors import UserError
from neurogen.training.run import train

torch.set_num_threads(1)
recorder.plot_run = lambda path: []
os.chdir(sys.argv[1])
for job in sys.argv[2:]:
    port, _, name = job.partition(":")
    os.environ["MASTER_PORT"] = port
    with open(f"{name}.json") as file:
        overrides = json.load(file)
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
        sys.exit(1)
