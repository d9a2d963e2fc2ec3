import io
import os
import pty

import pytest

from neurogen.training import progress
from neurogen.training.progress import BarProgress, Budget, PlainProgress, make_progress


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((None, None, None), 0.0),
        ((100, None, None), 0.1),
        ((100, 40, None), 0.5),
        ((100, 40, 4.0), 0.75),
        ((5, None, None), 1.0),
        ((0, None, None), 0.0),
    ],
)
def test_the_nearest_limit_counts(limits: tuple, expected: float) -> None:
    budget = Budget(max_steps=limits[0], max_tokens=limits[1], max_seconds=limits[2])
    assert budget.fraction(step=10, tokens=20, seconds=3.0) == expected


def test_plain_lines_come_at_most_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    bar = make_progress(max_steps=100, stream=stream, every_seconds=10.0)
    assert isinstance(bar, PlainProgress)
    with bar:
        for step in range(1, 36):
            now = float(step)
            bar.update(step=step, tokens=step, seconds=now, fields={"loss": 1.23456, "tokens/s": 12345.6})
        bar.say("saved [here]")
    lines = stream.getvalue().splitlines()
    assert [line.split("step ")[1].split()[0] for line in lines if "step" in line] == ["1", "11", "21", "31", "35"]
    assert lines[0] == "  1.0%  1s  step 1  loss 1.235  tokens/s 12,346"
    assert lines[-2] == "saved [here]"
    assert "\x1b" not in stream.getvalue()


def test_nothing_to_say_is_nothing() -> None:
    stream = io.StringIO()
    with make_progress(stream=stream):
        pass
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    master, slave = pty.openpty()
    with open(slave, "w") as stream:
        bar = make_progress(max_steps=4, stream=stream)
        assert isinstance(bar, BarProgress)
        with bar:
            bar.update(step=2, tokens=0, seconds=0.0, fields={"loss": 2.5})
            bar.say("a [bold]line[/bold]")
        stream.flush()
        os.set_blocking(master, False)
        shown = ""
        while True:
            try:
                shown += os.read(master, 65536).decode()
            except BlockingIOError:
                break
    os.close(master)
    assert "50%" in shown
    assert "step 2  loss 2.5" in shown
    assert "a [bold]line[/bold]" in shown


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    master, slave = pty.openpty()
    with open(slave, "w") as stream:
        assert isinstance(make_progress(stream=stream), PlainProgress)
    os.close(master)
