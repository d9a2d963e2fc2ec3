"""Reports say what the result files hold."""

import json

import pytest

from neurogen.benchmark.report import plot, summary
from scripts import report_benchmarks


def make_row(provider, median, *, op="scan", extra=None):
    return {
        "suite": "kernels",
        "op": op,
        "provider": provider,
        "shape": {"B": 2},
        "dtype": "bfloat16",
        "median": median,
        "p20": median and 0.9 * median,
        "p80": median and 1.2 * median,
        "num_runs": 5,
        "peak_bytes": None,
        "error": None,
        "failure": None if median else "RuntimeError: no",
        "recorded": True,
        "extra": extra or {},
        "machine": {"device": "a card", "commit": "abc"},
    }


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "kernels.json"
    rows = [
        make_row("peer", 0.004),
        make_row("broken", None),
        make_row("neurogen fused", 0.001, extra={"us_per_step": 2.0}),
        make_row("neurogen fused, CUDA graph", 0.002, op="step"),
    ]
    path.write_text(json.dumps(rows))
    return path


def test_the_summary_holds_ours_against_the_quickest_other(results):
    lines = summary(results).splitlines()
    assert lines[2] == "| scan: B=2, bfloat16, a card | 1.000 ms, 2.00 us a step | peer, 4.000 ms | 4.00 x |"
    assert lines[3] == "| step: B=2, bfloat16, a card | CUDA graph, 2.000 ms |  |  |"


def test_the_picture_is_one(results, tmp_path):
    plot(results, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_timed_is_no_picture(tmp_path):
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps([make_row("broken", None)]))
    plot(path, tmp_path / "bars.png")
    assert not (tmp_path / "bars.png").exists()


def test_a_document_is_given_its_section(results, tmp_path):
    document = tmp_path / "BENCHMARKS.md"
    document.write_text("before\n<!-- kernels -->\nold\n<!-- /kernels -->\nafter\n")
    assert report_benchmarks.main([str(results), "--into", str(document)]) == 0
    text = document.read_text()
    assert "4.00 x" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "RuntimeError: no" in results.with_suffix(".md").read_text()


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert report_benchmarks.main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
