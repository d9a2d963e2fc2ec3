"""The harness reports what it timed, and nothing for a contender that is wrong or cannot run."""

import json
import time
from collections import Counter

import pytest
import torch

from neurogen.benchmark import Contender, compare, write_rows
from neurogen.benchmark import kernels as kernel_suite
from neurogen.benchmark.report import markdown

CPU = torch.device("cpu")
SHAPE = {"N": 1}


def sleeper(seconds, log=None, name=""):
    def prepare(device):
        def work():
            if log is not None:
                log.append(name)
            time.sleep(seconds)

        return work

    return prepare


def run(*contenders, **kwargs):
    return compare("test", "sleep", contenders, shape=SHAPE, dtype="float32", device=CPU, seconds=0.0, **kwargs)


def test_times_are_those_of_the_work_and_turns_alternate():
    log: list[str] = []
    rows = run(
        Contender("slow", sleeper(0.004, log, "slow")),
        Contender("quick", sleeper(0.001, log, "quick")),
        min_rounds=5,
        extra=lambda seconds: {"per_second": 1 / seconds},
    )
    assert [row.provider for row in rows] == ["slow", "quick"]
    for row, seconds in zip(rows, (0.004, 0.001)):
        assert row.p20 >= seconds
        assert row.p20 <= row.median <= row.p80
        assert row.num_runs == 5
        assert row.extra == {"per_second": 1 / row.median}
    assert log[-10:] == ["slow", "quick"] * 5


def test_a_wrong_contender_has_no_time():
    rows = run(
        Contender("wrong", sleeper(0.0), error=lambda device: 0.5),
        Contender("nan", sleeper(0.0), error=lambda device: float("nan")),
        Contender("right", sleeper(0.0), error=lambda device: 1e-3),
    )
    assert [row.median is None for row in rows] == [True, True, False]
    assert rows[0].failure == "wrong: relative error 5.0e-01, limit 2e-02"
    assert rows[2].error == 1e-3


def test_a_contender_that_raises_is_listed_with_its_error():
    def absent(device):
        raise ModuleNotFoundError("No module named 'peer'\nsecond line")

    (row,) = run(Contender("peer", absent))
    assert row.failure == "ModuleNotFoundError: No module named 'peer'"


def test_result_file_keeps_the_newest_row_of_a_kind(tmp_path):
    path = tmp_path / "results.json"
    write_rows(path, run(Contender("a", sleeper(0.0)), Contender("b", sleeper(0.0))))
    newer = run(Contender("a", sleeper(0.002)))
    write_rows(path, newer)
    rows = {row["provider"]: row for row in json.loads(path.read_text())}
    assert set(rows) == {"a", "b"}
    assert rows["a"]["median"] == newer[0].median
    assert {"torch", "device", "commit"} <= set(rows["a"]["machine"])
    table = markdown(path)
    assert "### sleep: N=1, float32" in table
    assert table.index("| b |") < table.index("| a |")  # fastest first


@pytest.mark.parametrize("backward", [False, True])
def test_the_check_of_an_op_sees_an_error(backward, monkeypatch):
    inputs = {"x": torch.randn(3, 4)}
    op = kernel_suite.Op(inputs, frozenset({"x"}), lambda x, backend: x["x"] * (1.1 if backend == "fused" else 1.0))
    fused, reference = kernel_suite.op_contenders(op, torch.float32, backward=backward)
    assert fused.error(CPU) == pytest.approx(0.1, rel=1e-5)
    assert reference.error is None


def test_every_case_of_the_kernels_suite_is_unique_and_ours_come_first():
    cases = list(kernel_suite.cases(small=True))
    keys = [(case.op, tuple(case.shape.items())) for case in cases]
    assert len(set(keys)) == len(keys)
    for case in cases:
        assert [contender.provider for contender in case.contenders][:2] == ["neurogen fused", "neurogen reference"]


def test_a_slow_contender_does_not_hold_up_the_others() -> None:
    turns = Counter()

    def contender(name: str, seconds: float) -> Contender:
        def work() -> None:
            turns[name] += 1
            time.sleep(seconds)

        return Contender(name, lambda device: work)

    rows = compare(
        "test", "wait", [contender("slow", 0.15), contender("quick", 0.001)], shape={}, dtype="float32",
        device=torch.device("cpu"), seconds=0.0, min_rounds=8,
    )  # fmt: skip
    assert [row.num_runs for row in rows] == [3, 8]
    assert turns == {"slow": 5, "quick": 10}  # each ran once to compile and once to be timed
