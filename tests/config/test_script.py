"""The frame of the scripts: exit codes, one line on stderr, verbatim arguments."""

import os
from pathlib import Path

import pytest

from neurogen.config.compose import compose_config, config_to_dict
from neurogen.config.continued import continue_config
from neurogen.config.script import run_script
from neurogen.config.script_configs import EvaluateConfig, GenerateConfig
from neurogen.errors import UserError
from neurogen.training.run_directory import RunDirectory


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_task_gets_the_checked_config_and_gives_the_exit_code(tmp_path: Path) -> None:
    seen = []
    assert run_script(lambda config: seen.append(config), arguments=["seed=3"]) == 0
    assert run_script(lambda config: 130, arguments=[]) == 130
    assert seen[0].seed == 3
    assert list(tmp_path.iterdir()) == []  # neither a folder of Hydra's nor a log file


@pytest.mark.parametrize("arguments", [["optimizer=foo"], ["seed=abc"], ["seed"], ["trainer=null"], ["data.lanes=0"]])
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(lambda config: pytest.fail("ran"), arguments=arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert arguments[0].split("=")[0] in err


def test_an_error_of_the_task_too(capsys: pytest.CaptureFixture[str]) -> None:
    def task(config: object) -> None:
        raise UserError("notes.txt:\n  is empty")

    assert run_script(task, arguments=[]) == 2
    assert capsys.readouterr().err == "error: notes.txt: is empty\n"


def test_a_bug_keeps_its_traceback_and_the_environment_is_put_back() -> None:
    def task(config: object) -> None:
        raise RuntimeError("a bug")

    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="a bug"):
        run_script(task, arguments=[])
    assert dict(os.environ) == before


def test_ctrl_c_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def task(config: object) -> None:
        raise KeyboardInterrupt

    assert run_script(task, arguments=[]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_verbatim_arguments_go_past_hydra() -> None:
    seen: list[GenerateConfig] = []
    prompt = "def f(x): return {'a': ${x}, **y} # = \\ '\"\n"
    code = run_script(
        lambda config: seen.append(config),
        config_name="generate",
        root=GenerateConfig,
        verbatim=("prompt", "checkpoint"),
        arguments=[f"prompt={prompt}", "checkpoint=runs/a=b, c", "seed=1"],
    )
    assert code == 0
    assert (seen[0].prompt, seen[0].checkpoint, seen[0].seed) == (prompt, "runs/a=b, c", 1)


def test_resume_takes_the_saved_config_with_this_command_lines_changes(tmp_path: Path) -> None:
    saved = compose_config(["experiment=test", "optimizer=muon", "optimizer.lr=0.5", "trainer.max_steps=77"])
    with RunDirectory.create(tmp_path / "run", config=config_to_dict(saved)):
        pass
    seen = []
    arguments = ["resume=run", "trainer.max_steps=10_000", "schedule=wsd", "trainer.evaluate_every=5"]
    assert run_script(lambda config: seen.append(config), prepare=continue_config, arguments=arguments) == 0
    config = seen[0]
    assert (config.optimizer.name, config.optimizer.lr, config.model.embedding_dim) == ("muon", 0.5, 16)
    assert config.trainer.max_steps == 10_000  # the default, but named: it counts
    assert config.trainer.evaluate_every == 5
    assert config.schedule.name == "wsd"
    assert (config.resume, config.run_dir) == ("run", None)


def test_resume_from_nothing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(lambda config: pytest.fail("ran"), prepare=continue_config, arguments=["resume=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [("generate", "promt=x", "did you mean prompt?"), ("evaluate", "data.lanes=8", "no data is chosen")],
)
def test_errors_know_the_keys_of_their_script(
    name: str, argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = {"generate": GenerateConfig, "evaluate": EvaluateConfig}[name]
    assert run_script(lambda config: pytest.fail("ran"), config_name=name, root=root, arguments=[argument]) == 2
    assert message in capsys.readouterr().err
