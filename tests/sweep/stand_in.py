"""Takes the place of scripts/train.py in tests of sweeps: val/bpb is a parabola of the learning rate.

It starts in no time, counts its calls, fails at seed=13 and, at seed=14, waits for SIGTERM as a run does.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

settings = dict(word.split("=", 1) for word in sys.argv[1:])
run = Path(settings["run_dir"].strip("'"))
lr = float(settings["optimizer.lr"])
print("started", sys.argv[1:], flush=True)
print("sees GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if settings.get("seed") == "13":
    raise RuntimeError("thirteen")
if settings.get("seed") == "14":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    Path("waiting").touch()
    time.sleep(60)
run.mkdir(parents=True, exist_ok=True)
with (run / "calls").open("a") as calls:
    calls.write("x")
(run / "config.yaml").write_text("seed: 0\n")
rows = [{"step": n, "tokens": 10 * n, "seconds": 1.0, "val/bpb": (lr - 0.3) ** 2 + 1 / n} for n in (1, 2)]
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
(run / "status.json").write_text(json.dumps({"state": "finished"}))
