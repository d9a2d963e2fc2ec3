import math
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from neurogen.errors import UserError
from neurogen.training.metrics import MetricsWriter
from neurogen.training.plots import curve, main, plot_run, smooth
from neurogen.training.run_directory import RunDirectory


def make_run(path: Path, num_rows: int) -> Path:
    noise = random.Random(0)
    with RunDirectory.create(path, config={}) as run, MetricsWriter(run.metrics_path) as writer:
        for step in range(1, num_rows + 1):
            metrics = {"train/loss": 5.0 / step + noise.random(), "throughput/tokens_per_second": 1e4 * noise.random()}
            metrics |= {f"health/{region}/firing_rate": noise.random() for region in ("pfc", "broca", "wernicke")}
            metrics |= {"health/pfc/silent": 0.0, "health/pfc/saturated": 0.5, "health/go_rate": 0.25}
            if step % 5 == 0:
                metrics |= {"val/loss": 5.0 / step, "val/bpb": 7.0 / step}
            if step == 3:
                metrics["train/loss"] = math.nan
            writer.write(metrics, step=step, tokens=step, seconds=step)
    return path


@pytest.mark.parametrize("num_rows", [5, 120])
def test_every_curve_becomes_a_png_with_something_on_it(tmp_path: Path, num_rows: int) -> None:
    run = make_run(tmp_path / "run", num_rows)
    paths = plot_run(run)
    assert {path.stem for path in paths} == {
        "loss",
        "bits_per_byte",
        "throughput",
        "firing_rates",
        "silent",
        "saturated",
        "go_rate",
    }
    for path in paths:
        assert path.parent == run / "plots"
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width >= 1000
        assert height >= 500
        pixels = imread(path)[..., :3]
        is_colored = np.ptp(pixels, axis=2) > 0.2
        assert is_colored.mean() > 0.0002, path


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", config={}) as run:
        with MetricsWriter(run.metrics_path) as writer:
            assert plot_run(run.path) == []
            writer.write({"val/bpb": math.inf}, step=1, tokens=1, seconds=1)
        assert [path.stem for path in plot_run(run.path)] == ["bits_per_byte"]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        plot_run(tmp_path)
    RunDirectory.create(tmp_path / "run", config={}).close()
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl"):
        plot_run(tmp_path / "run")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with RunDirectory.create(run, config={}) as created, MetricsWriter(created.metrics_path) as writer:
        writer.write({"val/bpb": 2.0}, step=1, tokens=1, seconds=1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MPLBACKEND": "TkAgg"}
    command = [sys.executable, "-m", "neurogen.training.plots"]
    done = subprocess.run([*command, str(run)], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(run / "plots" / "bits_per_byte.png")]
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path)])
    assert main() == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")


def test_curve_takes_the_rows_that_have_the_metric() -> None:
    rows = [{"step": 1, "a": 2.0}, {"step": 2}, {"step": 5, "a": math.inf}, {"step": 6, "a": 3}]
    steps, values = curve(rows, "a")
    assert steps == [1.0, 5.0, 6.0]
    assert values[0] == 2.0
    assert math.isnan(values[1])
    assert values[2] == 3.0
    assert curve([], "a") == ([], [])


def test_smoothing() -> None:
    assert smooth([], span=3) == []
    assert smooth([4.0] * 9, span=3) == pytest.approx([4.0] * 9)
    line = [float(value) for value in range(101)]
    assert smooth(line, span=5)[50] == pytest.approx(50.0)  # no lag
    assert smooth([1.0, math.nan, 1.0], span=2)[::2] == pytest.approx([1.0, 1.0])
    assert math.isnan(smooth([1.0, math.nan, 1.0], span=2)[1])
    assert math.isnan(smooth([math.nan], span=2)[0])
    # Two points, from the definition: weights 1 and k = exp(-1/span), normalised.
    k = math.exp(-1 / 2)
    average = (0.0 * k + 1.0) / (1 + k)
    assert smooth([0.0, 1.0], span=2) == pytest.approx([(0.0 + 1.0 * k / (1 + k)) / 2, (average + 1.0) / 2])
