import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurogen.errors import UserError
from neurogen.training.metrics import MetricsWriter, read_metrics


def write(path: Path, steps, **options) -> None:
    with MetricsWriter(path, **options) as writer:
        for step in steps:
            writer.write({"train/loss": 1.0 / (step + 1)}, step=step, tokens=10 * step, seconds=0.5 * step)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_rows_come_back_as_written(path: Path) -> None:
    with MetricsWriter(path) as writer:
        first = writer.write({"train/loss": 1 / 3, "memory/peak_bytes": 2**40}, step=0, tokens=0, seconds=0)
        second = writer.write(
            {"a": torch.tensor(2.5), "b": np.float32(0.5), "c": np.int64(3), "d": torch.tensor(4), "e": True},
            step=1,
            tokens=7,
            seconds=0.1,
        )
    assert first == {"step": 0, "tokens": 0, "seconds": 0.0, "train/loss": 1 / 3, "memory/peak_bytes": 2**40}
    assert second == {"step": 1, "tokens": 7, "seconds": 0.1, "a": 2.5, "b": 0.5, "c": 3, "d": 4, "e": 1}
    assert read_metrics(path) == [first, second]
    assert type(read_metrics(path)[0]["memory/peak_bytes"]) is int


def test_what_is_not_finite_is_strict_json(path: Path) -> None:
    with MetricsWriter(path) as writer:
        writer.write({"nan": math.nan, "up": math.inf, "down": torch.tensor(-math.inf)}, step=1, tokens=1, seconds=1)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the file")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert (row["nan"], row["up"], row["down"]) == ("NaN", "Infinity", "-Infinity")
    (row,) = read_metrics(path)
    assert math.isnan(row["nan"])
    assert (row["up"], row["down"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("step", [2, 1, 0, -1])
def test_steps_strictly_increase(path: Path, step: int) -> None:
    with MetricsWriter(path) as writer:
        writer.write({}, step=2, tokens=0, seconds=0)
        with pytest.raises(ValueError, match="strictly increase"):
            writer.write({}, step=step, tokens=0, seconds=0)
    assert len(read_metrics(path)) == 1


def test_a_metric_cannot_take_a_required_name(path: Path) -> None:
    with MetricsWriter(path) as writer, pytest.raises(ValueError, match="tokens"):
        writer.write({"tokens": 1}, step=1, tokens=0, seconds=0)


def test_each_row_is_there_when_write_returns(path: Path) -> None:
    writer = MetricsWriter(path)
    for step in range(3):
        writer.write({}, step=step, tokens=0, seconds=0)
        assert len(read_metrics(path)) == step + 1
    writer.close()
    writer.close()


@pytest.mark.parametrize("resume_step", [0, 1, 4, 5, 9, 100])
def test_a_resumed_file_equals_the_unbroken_one(tmp_path: Path, resume_step: int) -> None:
    write(tmp_path / "whole", range(10))
    write(tmp_path / "broken", range(min(10, resume_step + 4)))
    write(tmp_path / "broken", range(resume_step + 1, 10), resume_step=resume_step)
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "whole").read_bytes()


def test_resuming_from_the_start_empties_the_file(path: Path) -> None:
    write(path, range(1, 5))
    write(path, [1], resume_step=0)
    assert [row["step"] for row in read_metrics(path)] == [1]


def test_resuming_without_a_file_starts_one(path: Path) -> None:
    write(path, [5], resume_step=4)
    assert [row["step"] for row in read_metrics(path)] == [5]


def test_every_torn_end_is_cut(tmp_path: Path) -> None:
    """Whatever prefix of the file a crash leaves, the rows that are whole survive and the file goes on soundly."""
    write(tmp_path / "whole", range(3))
    content = (tmp_path / "whole").read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    torn = tmp_path / "torn"
    for length in range(len(content) + 1):
        torn.write_bytes(content[:length])
        whole = sum(end <= length for end in ends)
        assert [row["step"] for row in read_metrics(torn)] == list(range(whole))
        write(torn, range(whole, 3), resume_step=2)
        assert torn.read_bytes() == content


@pytest.mark.parametrize("end", [b"\x00" * 50, b"\x00" * 50 + b"\n", b"{}\n", b'{"step": 9\n', b"\xff\n"])
def test_garbage_at_the_end_is_cut(path: Path, end: bytes) -> None:
    write(path, range(3))
    sound = path.read_bytes()
    path.write_bytes(sound + end)
    assert len(read_metrics(path)) == 3
    write(path, [], resume_step=9)
    assert path.read_bytes() == sound


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"", "line 2"),
        (b"nonsense", "line 2"),
        (b"[1]", "not an object"),
        (b'{"step": 1, "tokens": 0}', "seconds is missing"),
        (b'{"step": 1.5, "tokens": 0, "seconds": 0}', "whole number"),
        (b'{"step": 1, "tokens": 0, "seconds": 0, "a": "text"}', "a is not a number"),
        (b'{"step": 1, "tokens": 0, "seconds": 0, "a": null}', "a is not a number"),
        (b'{"step": 1, "tokens": 0, "seconds": 0, "a": NaN}', "NaN is not JSON"),
        (b'{"step": 1, "step": 1, "tokens": 0, "seconds": 0}', "twice"),
        (b'{"step": 0, "tokens": 0, "seconds": 0}', "does not follow"),
    ],
)
def test_a_broken_line_inside_is_one_line(path: Path, line: bytes, problem: str) -> None:
    write(path, [0, 2])
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, second, b""]))
    for use in (lambda: read_metrics(path), lambda: MetricsWriter(path, resume_step=5)):
        with pytest.raises(UserError, match=problem) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_rows_nobody_asked_to_resume_are_not_touched(path: Path) -> None:
    write(path, range(3))
    before = path.read_bytes()
    with pytest.raises(UserError, match="has rows already"):
        MetricsWriter(path)
    assert path.read_bytes() == before


def test_a_missing_file_is_one_line(path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_metrics(path)


@settings(max_examples=200, deadline=None)
@given(
    content=st.binary(max_size=60)
    | st.lists(st.sampled_from([b'{"step": 1, "tokens": 0, "seconds": 0}', b"\n", b"{"])).map(b"".join)
)
def test_any_bytes_are_rows_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    refusal = ""
    try:
        read_metrics(path)
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


FULL_DISK = """
import resource, sys
from neurogen.training.metrics import MetricsWriter
with MetricsWriter(sys.argv[1]) as writer:
    writer.write({}, step=1, tokens=0, seconds=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, resource.RLIM_INFINITY))
    try:
        writer.write({"a": 1}, step=2, tokens=0, seconds=0)
    except OSError as error:
        print(error.errno)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.write({}, step=3, tokens=0, seconds=0)
"""


def test_a_row_the_disk_refuses_is_taken_back(path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) == errno.EFBIG
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
