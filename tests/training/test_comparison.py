"""Runs side by side."""

import json
import math
import runpy
from pathlib import Path

import pytest
import yaml

from neurogen.config.compose import compose_config, config_to_dict
from neurogen.errors import UserError
from neurogen.training.comparison import (
    comparison_rows,
    comparison_table,
    curve_differences,
    group_runs,
    insert_section,
    plot_comparison,
    read_run,
    write_comparison,
)

compare_runs = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "compare_runs.py"))["main"]


def write_run(folder: Path, name: str, losses: list[float], **settings: object) -> Path:
    path = folder / name
    path.mkdir()
    config = {"seed": 0, "run_dir": name, "model": {"name": "brain", "embedding_dim": 16}, "optimizer": {"lr": 0.1}}
    (path / "config.yaml").write_text(yaml.safe_dump(config | settings))
    (path / "status.json").write_text(json.dumps({"state": "finished"}))
    rows = [
        {"step": i + 1, "tokens": 2_000_000 * (i + 1), "seconds": 0.5 * (i + 1), "train/loss": loss}
        for i, loss in enumerate(losses)
    ]
    rows[-1]["val/bpb"] = losses[-1] / math.log(2) if math.isfinite(losses[-1]) else "NaN"
    rows[-1]["train/loss"] = rows[-1]["val/bpb"]
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
    assert lines[0] == "| budget | run | seeds | steps | M tokens | seconds | tokens/s | bits per byte |"
    bpb, spread = 2.5 / math.log(2), math.sqrt(0.5) / math.log(2)
    figures = f"2 ± 0 | 4.0 ± 0.0 | 1.0 ± 0.0 | 4,000,000 ± 0 | {bpb:.4f} ± {spread:.4f} |"
    assert lines[2] == f"| - | model=gpt | 2 | {figures}"
    assert lines[3] == f"| - | model=brain | 1 | 2 | 4.0 | 1.0 | 4,000,000 | {4 / math.log(2):.4f} |"
    assert len(lines) == 4
    plot_comparison(runs, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_three_seeds_of_two_models_under_two_budgets(tmp_path: Path) -> None:
    """Budgets come one after the other, the best of each first; mean and spread are the sample's."""
    values = {("brain", 50): (1.0, 1.2, 1.1), ("gpt", 50): (1.3, 1.3, 1.3), ("brain", 180): (0.8, 0.7, 0.9)}
    paths = [
        write_run(
            tmp_path,
            f"{model}{budget}{seed}",
            [2.0, value],
            model={"name": model},
            seed=seed,
            trainer={"max_seconds": budget, "max_tokens": None, "max_steps": 1000},
        )
        for (model, budget), losses in reversed(values.items())
        for seed, value in enumerate(losses)
    ]
    runs = [read_run(path) for path in paths]
    lines = comparison_table(runs).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:3] for row in cells] == [
        ["50 s", "model=brain", "3"],
        ["50 s", "model=gpt", "3"],
        ["180 s", "model=brain", "3"],
    ]
    assert cells[0][-1] == f"{1.1 / math.log(2):.4f} ± {0.1 / math.log(2):.4f}"
    assert cells[1][-1] == f"{1.3 / math.log(2):.4f} ± 0.0000"


def test_files_are_written_and_shown_in_a_document(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path, name, [2.0, loss])) for name, loss in (("a", 1.0), ("b", math.nan))]
    write_comparison(runs, tmp_path / "out", "bytes")
    rows = json.loads((tmp_path / "out" / "bytes.json").read_text())
    assert [row["run"] for row in rows] == ["a", "b"]
    assert rows[0]["val/bpb"] == pytest.approx(1.0 / math.log(2))
    assert "val/bpb" not in rows[1]
    svg = (tmp_path / "out" / "bytes.svg").read_bytes()
    write_comparison(runs, tmp_path / "out", "bytes")
    assert (tmp_path / "out" / "bytes.svg").read_bytes() == svg

    document = tmp_path / "doc.md"
    document.write_text("before\n<!-- bytes -->\nold\n<!-- /bytes -->\nafter\n")
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--name", "bytes", "--folder", str(tmp_path / "out")]
    assert compare_runs([*words, "--into", str(document)]) == 0
    text = document.read_text()
    table = (tmp_path / "out" / "bytes.md").read_text()
    assert text == f"before\n<!-- bytes -->\n{table}\n![bytes](out/bytes.png)\n<!-- /bytes -->\nafter\n"
    assert compare_runs([*words, "--into", str(document)]) == 0
    assert document.read_text() == text


def test_a_document_without_the_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "<!-- x -->\n", "<!-- /x -->\n<!-- x -->\n", "<!-- x -->\n<!-- /x -->\n" * 2):
        with pytest.raises(UserError, match="no place for x"):
            insert_section(text, "x", "new")
    path = write_run(tmp_path, "a", [1.0])
    assert compare_runs([str(path), "--into", "doc.md"]) == 2
    assert "--name" in capsys.readouterr().err


def test_unfinished_runs_are_named(tmp_path: Path) -> None:
    path = write_run(tmp_path, "a", [1.0])
    (path / "status.json").write_text(json.dumps({"state": "interrupted"}))
    assert comparison_table([read_run(path)]).endswith("\nNot finished: a (interrupted).\n")


def test_one_run_and_settings_that_only_one_has(tmp_path: Path) -> None:
    alone = read_run(write_run(tmp_path, "alone", [1.0]))
    assert list(group_runs([alone])) == ["alone"]
    faster = read_run(write_run(tmp_path, "faster", [1.0], optimizer={"lr": 0.2}))
    assert list(group_runs([alone, faster])) == ["optimizer.lr=0.1", "optimizer.lr=0.2"]


def test_the_best_validation_loss_is_kept_with_its_place(tmp_path: Path) -> None:
    path = write_run(tmp_path, "a", [3.0, 1.0, 2.0, math.nan])
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"val/loss": loss} for row, loss in zip(rows, (3.0, 1.0, 2.0, "NaN"))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = comparison_rows([read_run(path)])
    assert row["best"] == {"val/loss": 1.0, "step": 2, "seconds": 1.0}
    assert "best" not in comparison_rows([read_run(write_run(tmp_path, "b", [1.0]))])[0]


def test_a_setting_that_came_later_had_its_default(tmp_path: Path) -> None:
    """Runs of two versions are seeds of one experiment, unless one of them sets what the other did not have."""
    now = config_to_dict(compose_config(["experiment=test", "data=text", "data.path=notes.txt"]))
    before = {key: dict(value) if isinstance(value, dict) else value for key, value in now.items()}
    del before["model"]["dropout"]
    del before["trainer"]["overlap_update"]
    other = now | {"model": now["model"] | {"dropout": 0.5}}
    configs = {"a": before, "b": now | {"seed": 1}, "c": other}
    runs = [read_run(write_run(tmp_path, name, [1.0], **config)) for name, config in configs.items()]
    groups = group_runs(runs)
    assert [[run.name for run in members] for members in groups.values()] == [["a", "b"], ["c"]]
    assert list(groups) == ["model.dropout=0.0", "model.dropout=0.5"]


def test_a_run_without_rows_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path, "empty", [1.0])
    (path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"):
        read_run(path)
    with pytest.raises(UserError):
        read_run(tmp_path / "nowhere")


def test_differences_are_of_runs_that_differ_in_one_setting(tmp_path: Path) -> None:
    fast = {"mode": {"name": "fast"}}
    runs = [
        read_run(write_run(tmp_path, name, losses, **settings))
        for name, losses, settings in [
            ("a", [5.0, 4.0, 1.0], {"mode": {"name": "slow"}}),
            ("b", [5.0, 4.5, 1.0], fast),
            ("c", [3.0, 4.5, 1.0], fast | {"seed": 1}),
        ]
    ]
    lines = curve_differences(runs).splitlines()[2:]
    # The last row's loss is the same number in all; a and c differ in two settings.
    mode, seed = (0.5**2 / 3) ** 0.5, (2.0**2 / 3) ** 0.5
    assert lines == [
        f"| mode.name | 1 | {mode:.4f} | {mode:.4f} | {mode:.4f} |",
        f"| seed | 1 | {seed:.4f} | {seed:.4f} | {seed:.4f} |",
    ]
    with pytest.raises(UserError, match="no two of these runs"):
        curve_differences([runs[0], runs[2]])
