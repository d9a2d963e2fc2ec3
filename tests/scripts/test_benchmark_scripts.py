"""The benchmark scripts that are no suite: what they measure is what they say, at sizes of a test."""

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["experiment=test", "data=text", "data.path=notes.txt", "data.window=16"]
STAND_IN = """
import json, os, sys
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
lanes, strategy = int(words["data.lanes"]), words["trainer.distributed"]
size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
assert (size > 1) == (strategy != "none")
if strategy == "fsdp":
    sys.exit("error: trainer.distributed=fsdp: not today")
if rank == 0:
    run = Path(words["run_dir"])
    run.mkdir()
    rates = [1.0] * 2 + [100.0 * size * (0.9 if lanes == 8 * size else 0.6) * f for f in (1.0, 1.1, 0.9, 1.0)]
    every = int(words["trainer.log_every"])
    rows = [{"step": (i + 1) * every, "tokens": 1, "seconds": 1.0, "throughput/tokens_per_second": rate,
             "memory/peak_bytes": 1000 * size} for i, rate in enumerate(rates)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))


def rows_of(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    rows = json.loads(path.read_text())
    return {(row["op"], row["provider"], row["shape"]["processes"]): row for row in rows}


def test_scaling_is_what_its_definition_says(tmp_path: Path) -> None:
    """A stand-in for training says 90 tokens/s alone, 90 a process with lanes of its own and 60 with shared ones."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    words = ["processes=1,2", "strategy=ddp,fsdp", "steps=30", "skip=2", f"out={tmp_path}/o.json", "data.lanes=8"]
    assert script("benchmark_scaling")["main"]([*words, "model=small"], script=tmp_path / "stand_in.py") == 0
    rows = rows_of(tmp_path / "o.json")
    assert {key[0] for key in rows} == {"train, alone", "train, weak", "train, strong"}
    alone, weak = rows["train, alone", "none", 1], rows["train, weak", "ddp", 2]
    strong, failed = rows["train, strong", "ddp", 2], rows["train, weak", "fsdp", 2]
    assert [row["shape"]["lanes"] for row in (alone, weak, strong)] == [8, 16, 8]
    assert [row["extra"]["efficiency"] for row in (alone, weak, strong)] == pytest.approx([1.0, 1.0, 60 / 90])
    assert [row["extra"]["tokens_per_second"] for row in (alone, weak, strong)] == pytest.approx([90, 180, 120])
    assert weak["median"] == pytest.approx(16 * weak["shape"]["window"] / 180, rel=0.02)
    assert weak["p20"] < weak["median"] < weak["p80"]
    assert (weak["num_runs"], weak["peak_bytes"], weak["shape"]["model"]) == (4, 2000, "small")
    assert failed["median"] is None
    assert "not today" in failed["failure"]


STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(os.environ["PIDS"], "a") as file:
    file.write(f"{os.getpid()} {child.pid} ")
if os.environ.get("RANK") == "1":
    sys.exit("something broke")
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is not one that nobody has asked for its exit code."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_scaling_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process alone that never ends, one of two that fails while the other waits for it, and cases not begun."""
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    namespace = script("benchmark_scaling")
    namespace["main"].__globals__["GRACE_SECONDS"] = 0.2
    words = ["processes=2,4", "kinds=weak", "timeout=3", "budget=4", f"out={tmp_path}/o.json", "data.lanes=4"]
    start = time.monotonic()
    assert namespace["main"](words, script=tmp_path / "stubborn.py") == 0
    assert time.monotonic() - start < 60
    rows = rows_of(tmp_path / "o.json")
    assert set(rows) == {("train, alone", "none", 1), ("train, weak", "ddp", 2)}
    assert rows["train, alone", "none", 1]["failure"] == "did not end in time, and was ended"
    assert rows["train, weak", "ddp", 2]["failure"] in ("something broke", "did not end in time, and was ended")
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) >= 2
    time.sleep(0.2)
    assert not [pid for pid in pids if is_running(pid)]


def test_scaling_starts_the_next_case_ahead(tmp_path: Path) -> None:
    """The processes of a case that is begun late have waited for it."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    words = ["processes=2", "kinds=strong", "steps=30", "skip=2", "ahead=1", f"out={tmp_path}/o.json", "data.lanes=8"]
    assert script("benchmark_scaling")["main"](words, script=tmp_path / "stand_in.py") == 0
    rows = rows_of(tmp_path / "o.json")
    assert [row["failure"] for row in rows.values()] == [None, None]
    assert rows["train, strong", "ddp", 2]["extra"]["efficiency"] == pytest.approx(60 / 90)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["processes=0"], "processes=0: must be whole numbers"),
        (["processes=3", "data.lanes=8"], "data.lanes=8: must divide by 3 processes"),
        (["strategy=magic"], "strategy=magic: unknown"),
        (["kinds=middling"], "kinds=middling: unknown; choose of weak, strong"),
        (["steps=10"], "steps=10: must hold at least two intervals"),
        (["steps=ten"], "steps=ten: must be a whole number"),
        (["model=huge"], "model=huge: no such choice"),
    ],
)
def test_scaling_refuses_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("benchmark_scaling")["main"](words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_scaling_of_real_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gloo processes on the CPU, both strategies."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NEUROGEN_CACHE": "cache"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "notes.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(200)))
    words = ["strategy=ddp,fsdp", "steps=6", "log_every=1", "skip=2", "out=o.json", *TINY, "data.lanes=4"]
    assert script("benchmark_scaling")["main"](words) == 0
    rows = rows_of(tmp_path / "o.json")
    assert len(rows) == 5
    for row in rows.values():
        assert row["failure"] is None
        assert row["num_runs"] == 4
        seconds = row["shape"]["lanes"] * 16 / row["extra"]["tokens_per_second"]
        assert row["p20"] <= seconds <= row["p80"]


def test_saving_is_measured_where_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEUROGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("neurogen.training.recorder.plot_run", lambda path: [])
    main = script("benchmark_saving")["main"]
    settings = {"model": "nano", "steps": 12, "every": 4, "repeats": 2, "lanes": 2, "window": 8, "device": "cpu"}
    assert main([*(f"{key}={value}" for key, value in settings.items()), "out=o.json"]) == 0
    rows = {row["provider"]: row for row in json.loads((tmp_path / "o.json").read_text())}
    counts = {name: row["num_runs"] for name, row in rows.items()}
    # Steps 4 to 11 of two runs: 4 and 8 save, the two after each have a save beside them.
    assert counts == {"never saves": 16, "each 4: saving": 4, "each 4: beside": 8, "each 4: rest": 4}
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] <= row["extra"]["max"] for row in rows.values())
    assert rows["each 4: saving"]["shape"]["checkpoint_bytes"] > 1_000_000
    never, saving, beside = (rows[name]["median"] for name in ("never saves", "each 4: saving", "each 4: beside"))
    extra = rows["each 4: saving"]["extra"]
    assert extra["wait_seconds"] == pytest.approx(saving - never)
    assert extra["seconds_a_save"] == pytest.approx(saving + 2 * beside - 3 * never)


def test_only_names_one_op_or_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "rows.json"
    words = ["suite=training", "size=test", "device=cpu", "seconds=0", "only=matrix|copy", f"output={output}"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(ROOT / "scripts" / "benchmark.py"), run_name="__main__")
    assert not leaving.value.code
    assert {row["op"] for row in json.loads(output.read_text())} == {"matrix product", "copy"}
