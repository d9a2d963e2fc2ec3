import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from omegaconf import OmegaConf

from neurogen.errors import UserError
from neurogen.training.loggers import Logger, LoggerConfig, NullLogger, WandbLogger, make_logger

ROWS = [
    {"step": 1, "tokens": 10, "seconds": 0.5, "train/loss": float("nan")},
    {"step": 2, "tokens": 20, "seconds": 1.0, "train/loss": 2.5},
]
CONF = Path(__file__).parents[2] / "conf" / "logger"


@pytest.fixture
def quiet_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account, no settings, and no way to ask for any."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("prompted"))


class FakeRun:
    """Keeps what it is told; fails at the call named."""

    def __init__(self, fail: str | None = None) -> None:
        self.calls: list[tuple] = []
        self.summary: dict = {}
        self._fail = fail

    def _note(self, name: str, *arguments: object) -> None:
        self.calls.append((name, *arguments))
        if name == self._fail:
            raise ConnectionError("the network\nis gone")

    def log(self, row: dict) -> None:
        self._note("log", row)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self._note("define_metric", name, step_metric)

    def finish(self, exit_code: int) -> None:
        self._note("finish", exit_code)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A wandb package that keeps the arguments of init."""
    module = SimpleNamespace(inits=[], run=FakeRun(), Settings=lambda **options: options)
    module.Table = lambda columns, data: ("table", columns, data)
    module.Image = lambda path: ("image", path)

    def init(**options: object) -> FakeRun:
        module.inits.append(options)
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def use(logger: Logger, run_dir: Path) -> None:
    logger.start(config={"seed": 1}, run_dir=run_dir)
    for row in ROWS:
        logger.log(row)
    logger.log_samples([{"prompt": "a", "text": "b"}], step=2)
    logger.log_samples([], step=2)
    logger.log_images({"plots/loss": run_dir / "loss.png"}, step=2)
    logger.finish("finished")


@pytest.mark.usefixtures("quiet_home")
@pytest.mark.filterwarnings("default")  # of the package itself
def test_offline_writes_into_the_run_directory_and_asks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    logger = make_logger(LoggerConfig(name="wandb"))
    logger.start(config={"seed": 1}, run_dir=run_dir)
    for row in ROWS:
        logger.log(row)
    logger.log_samples([{"prompt": "a", "text": "b"}], step=2)
    # With error reporting its service would look up W&B's server, whatever the mode.
    services = [child.cmdline() for child in psutil.Process().children() if child.name().startswith("wandb-core")]
    assert services
    assert all("--no-observability" in words for words in services)
    logger.finish("finished")
    assert capsys.readouterr() == ("", "")
    run_id = (run_dir / "wandb_run_id").read_text().strip()
    (record,) = (run_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    deadline = time.monotonic() + 20
    while b"train/loss" not in record.read_bytes():  # a service process writes it, a moment after
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (table,) = (run_dir / "wandb").glob("offline-run-*/files/media/table/samples*.json")
    assert json.loads(table.read_text()) == {"columns": ["step", "prompt", "text"], "data": [[2, "a", "b"]]}


def test_offline_is_said_outright(tmp_path: Path, fake: SimpleNamespace) -> None:
    use(WandbLogger(LoggerConfig(name="wandb")), tmp_path)
    (options,) = fake.inits
    assert options["mode"] == "offline"
    assert options["dir"] == str(tmp_path)
    assert options["config"] == {"seed": 1}
    assert options["settings"]["silent"] is True
    logged = [call[1] for call in fake.run.calls if call[0] == "log"]
    assert logged[:2] == ROWS
    assert logged[2] == {"samples": ("table", ["step", "prompt", "text"], [[2, "a", "b"]]), "step": 2}
    assert logged[3] == {"plots/loss": ("image", str(tmp_path / "loss.png")), "step": 2}
    assert ("define_metric", "step", None) in fake.run.calls
    assert ("define_metric", "tokens", None) in fake.run.calls
    assert ("define_metric", "*", "step") in fake.run.calls
    assert fake.run.calls[-1] == ("finish", 0)
    assert fake.run.summary == {"state": "finished"}


@pytest.mark.parametrize(("mode", "asked", "expected"), [("offline", None, "false"), ("offline", "true", "true"),
                                                          ("online", None, None)])  # fmt: skip
def test_errors_are_reported_online_or_where_asked(
    tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, mode: str, asked: str | None,
    expected: str | None,
) -> None:  # fmt: skip
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")  # so that it is put back afterwards
    if asked is None:
        monkeypatch.delenv("WANDB_ERROR_REPORTING")
    use(WandbLogger(LoggerConfig(name="wandb", mode=mode)), tmp_path)
    assert os.environ.get("WANDB_ERROR_REPORTING") == expected


def test_online_by_one_choice_and_the_same_run_goes_on(tmp_path: Path, fake: SimpleNamespace) -> None:
    for _ in range(2):
        use(WandbLogger(LoggerConfig(name="wandb", mode="online")), tmp_path)
    first, second = fake.inits
    assert first["mode"] == "online"
    assert first["resume"] == "allow"
    assert first["id"] == second["id"]
    assert re.fullmatch(r"[0-9a-f]{8}", first["id"])


def test_a_failed_run_is_told(tmp_path: Path, fake: SimpleNamespace) -> None:
    logger = WandbLogger(LoggerConfig(name="wandb"))
    logger.start(config={}, run_dir=tmp_path)
    logger.finish("failed")
    logger.finish("failed")
    assert [call for call in fake.run.calls if call[0] == "finish"] == [("finish", 1)]


def test_the_table_holds_all_samples_so_far(tmp_path: Path, fake: SimpleNamespace) -> None:
    logger = WandbLogger(LoggerConfig(name="wandb"))
    logger.start(config={}, run_dir=tmp_path)
    for step in range(300):
        logger.log_samples([{"text": str(step)}], step=step)
    data = fake.run.calls[-1][1]["samples"][2]
    assert data[-1] == [299, "299"]
    assert len(data) == 200


@pytest.mark.parametrize("call", ["log", "define_metric", "finish"])
def test_a_failing_wandb_is_one_warning_and_then_silence(tmp_path: Path, fake: SimpleNamespace, call: str) -> None:
    fake.run = FakeRun(fail=call)
    warnings: list[str] = []
    use(WandbLogger(LoggerConfig(name="wandb"), warn=warnings.append), tmp_path)
    (warning,) = warnings
    assert "ConnectionError: the network is gone" in warning
    assert [name for name, *_ in fake.run.calls].count(call) == 1


def test_a_failing_init_is_one_warning(tmp_path: Path, fake: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    fake.init = lambda **_: (_ for _ in ()).throw(RuntimeError("no"))
    use(WandbLogger(LoggerConfig(name="wandb")), tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "warning: W&B logging is off from here on (RuntimeError: no); metrics.jsonl goes on\n"


def test_a_missing_package_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    use(WandbLogger(LoggerConfig(name="wandb"), warn=warnings.append), tmp_path)
    assert len(warnings) == 1
    assert "ModuleNotFoundError" in warnings[0]


def test_ctrl_c_is_not_swallowed(tmp_path: Path, fake: SimpleNamespace) -> None:
    fake.init = lambda **_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        use(WandbLogger(LoggerConfig(name="wandb")), tmp_path)


def test_none_leaves_nothing(tmp_path: Path) -> None:
    logger = make_logger(LoggerConfig())
    assert isinstance(logger, NullLogger)
    use(logger, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"name": "tensorboard"}, {"name": "wandb", "mode": "on"}])
def test_choices_that_do_not_exist(wrong: dict) -> None:
    with pytest.raises(UserError, match="does not exist; choose"):
        make_logger(LoggerConfig(**wrong))


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_is_a_valid_choice(path: Path) -> None:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LoggerConfig), OmegaConf.load(path)))
    assert config.name == path.stem
    assert config.mode == "offline"
    make_logger(config)
