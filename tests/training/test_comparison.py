"""Runs side by side."""

import json
import math
from pathlib import Path

import pytest
import yaml

from neurogen.errors import UserError
from neurogen.training.comparison import comparison_table, group_runs, plot_comparison, read_run


def write_run(folder: Path, name: str, losses: list[float], **settings: object) -> Path:
    path = folder / name
    path.mkdir()
    config = {"seed": 0, "run_dir": name, "model": {"name": "brain", "embedding_dim": 16}, "optimizer": {"lr": 0.1}}
    (path / "config.yaml").write_text(yaml.safe_dump(config | settings))
    (path / "status.json").write_text(json.dumps({"state": "finished"}))
    rows = [
        {"step": i + 1, "tokens": 10, "seconds": 0.5 * (i + 1), "train/loss": loss} for i, loss in enumerate(losses)
    ]
    rows[-1]["val/bpb"] = losses[-1] / math.log(2)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_seeds_share_a_row_and_the_best_comes_first(tmp_path: Path) -> None:
    gpt = {"name": "gpt", "num_layers": 2}
    paths = [
        write_run(tmp_path, "a", [5.0, 4.0]),
        write_run(tmp_path, "b", [5.0, 2.0], model=gpt),
        write_run(tmp_path, "c", [5.0, 3.0], model=gpt, seed=1),
    ]
    runs = [read_run(path) for path in paths]
    assert [[run.name for run in members] for members in group_runs(runs).values()] == [["a"], ["b", "c"]]
    lines = comparison_table(runs).splitlines()
    assert lines[0] == "| run | seeds | steps | seconds | bits per byte |"
    bpb, spread = 2.5 / math.log(2), math.sqrt(0.5) / math.log(2)
    assert lines[2] == f"| model=gpt | 2 | 2 ± 0 | 1.0 ± 0.0 | {bpb:.4f} ± {spread:.4f} |"
    assert lines[3] == f"| model=brain | 1 | 2 | 1.0 | {4 / math.log(2):.4f} |"
    assert len(lines) == 4
    png = plot_comparison(runs, tmp_path / "new" / "curves.png")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_one_run_and_settings_that_only_one_has(tmp_path: Path) -> None:
    alone = read_run(write_run(tmp_path, "alone", [1.0]))
    assert list(group_runs([alone])) == ["alone"]
    faster = read_run(write_run(tmp_path, "faster", [1.0], optimizer={"lr": 0.2}))
    assert list(group_runs([alone, faster])) == ["optimizer.lr=0.1", "optimizer.lr=0.2"]


def test_a_run_without_rows_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path, "empty", [1.0])
    (path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"):
        read_run(path)
    with pytest.raises(UserError):
        read_run(tmp_path / "nowhere")
