"""The scripts as a user runs them: train, evaluate, generate, and their mistakes."""

import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neurogen.brain import BrainState
from neurogen.errors import UserError
from neurogen.training.checkpoint import find_latest, load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(200))
TRAIN = ["experiment=test", "data=text", "data.path=notes.txt", "trainer.max_steps=2", "run_dir=runs/a"]


def run_process(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NEUROGEN_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which scripts/train.py left runs/a."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "notes.txt").write_text(TEXT)
    done = run_process("train.py", *TRAIN, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "finished at step 2" in done.stderr
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "runs", "cache"}
    return folder


def run_here(
    script: str, *arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script, in this process: each new one would cost seconds of imports."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NEUROGEN_CACHE", str(folder / "cache"))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    out, err = capsys.readouterr()
    return int(leaving.value.code or 0), out, err


def test_evaluate_prints_one_json_object(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_here("evaluate.py", "checkpoint=runs/a", folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    result = json.loads(out)
    assert code == 0
    assert out.count("\n") == 1
    assert (result["step"], result["mode"]) == (2, "unfused")
    assert result["num_bytes"] == pytest.approx(0.05 * len(TEXT), rel=0.02)
    assert 7 < result["bpb"] < 8.1
    assert result.keys() >= {"loss", "perplexity", "accuracy", "reset_loss", "reset_bpb"}


def test_evaluate_with_rounded_weights(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["checkpoint=runs/a", "weights=int8"]
    code, out, _ = run_here("evaluate.py", *words, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    result = json.loads(out)
    assert code == 0
    assert result["int8_num_weights"] > 0
    assert result["int8_bpb"] != result["bpb"]
    assert result["int8_bpb"] == pytest.approx(result["bpb"], abs=0.05)


def test_evaluate_at_several_contexts(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["checkpoint=runs/a", "contexts=[16,64]", "data=text", "data.path=notes.txt", "data.lanes=1"]
    words += ["data.window=16", "data.validation_bytes=200"]
    code, out, _ = run_here("evaluate.py", *words, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    result = json.loads(out)
    assert code == 0
    assert result["context_16_bpb"] == pytest.approx(result["reset_bpb"])
    assert result["context_64_bpb"] not in (result["context_16_bpb"], result["bpb"])
    words[1] = "contexts=[24]"
    code, _, err = run_here("evaluate.py", *words, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err) == (
        2,
        "error: contexts=24: not a multiple of data.window=16; change one of the two\n",
    )


def test_a_gpt_has_the_context_of_its_window() -> None:
    check = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["check_contexts"]
    check([512], 512, carries_state=False)
    check([512, 8192], 512, carries_state=True)
    with pytest.raises(UserError, match="carries nothing past its window"):
        check([512, 8192], 512, carries_state=False)


def test_diagnose_draws_a_checkpoints_health(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["what=health", "checkpoint=runs/a", "out=health"]
    code, out, _ = run_here("diagnose.py", *arguments, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "gradient_lag.png" in out
    result = json.loads((trained / "health" / "health-checkpoint.json").read_text())
    assert result["step"] == 2
    assert result["health"]["context_loss"][0]["loss"] == pytest.approx(math.log(257), abs=0.1)
    shutil.rmtree(trained / "health")


def test_evaluate_another_text_with_the_checkpoints_vocabulary(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained / "other.txt").write_text("x = 1\n" * 500)
    arguments = ["checkpoint=runs/a", "data=text", "data.path=other.txt", "data.validation_bytes=100", "data.lanes=2"]
    code, out, _ = run_here("evaluate.py", *arguments, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, json.loads(out)["num_bytes"]) == (0, 100)
    more = ["data.tokenizer=bpe", "data.vocab_size=300"]
    code, out, err = run_here("evaluate.py", *arguments, *more, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out) == (2, "")
    assert err == (
        "error: data.tokenizer=bpe: the checkpoint's vocabulary is bytes with 257 ids; use data.tokenizer=bytes\n"
    )


def test_texts_too_short_to_say_anything(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Less than a window to evaluate, or less than one a lane to train on: one line, and nothing half made."""
    (trained / "short.txt").write_text("hello")
    arguments = ["checkpoint=runs/a", "data=text", "data.path=short.txt"]
    code, out, err = run_here("evaluate.py", *arguments, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: data: its validation part has 2 tokens, no more than one window of 16")
    words = ["experiment=test", "data=text", "data.path=short.txt", "run_dir=runs/short"]
    code, out, err = run_here("train.py", *words, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the train stream has 5 tokens, but 4 lanes of window 16 need 64" in err
    assert not (trained / "runs/short").exists()
    assert all((entry / "manifest.json").is_file() for entry in (trained / "cache").iterdir())


def test_what_is_left_out_is_said(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": TEXT[:200]})] * 40
    lines[3], lines[5], lines[7] = '{"text": ""}', "{", '{"body": 1}'
    (trained / "gaps.jsonl").write_text("\n".join(lines))
    words = ["experiment=test", "data=text", "data.path=gaps.jsonl", "data.empty_documents=skip", "data.bad_lines=skip"]
    words += ["run_dir=runs/gaps", "trainer.max_steps=1", "trainer.evaluate_every=0", "trainer.sample_every=0"]
    code, _, err = run_here("train.py", *words, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "data: skipped_empty 1, skipped_bad_line 2; 37 documents are read" in err


@pytest.mark.parametrize("prompt", ["", "def f(x): return {'a': ${b}, **c}  # é\n"])
def test_generate_continues_any_prompt(
    prompt: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["checkpoint=runs/a", f"prompt={prompt}", "max_new_tokens=12", "seed=3"]
    code, plain, err = run_here("generate.py", *arguments, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    _, out, _ = run_here(
        "generate.py", *arguments, "format=jsonl", folder=trained, monkeypatch=monkeypatch, capsys=capsys
    )
    result = json.loads(out)
    assert code == 0
    assert result["prompt"] == prompt
    assert plain == prompt + result["text"] + "\n"
    assert 1 <= len(result["tokens"]) == result["num_tokens"] <= 12
    assert result["log_prob_mean"] < 0
    assert (result["seed"], result["sample"]) == (3, 0)
    assert result["tokens_per_second"] > 0
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s: [\d.,]+ tokens/s\n", err)


def test_generate_draws_samples_of_a_file_or_of_stdin_alike(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "def f(x):\n"
    (trained / "prompt.txt").write_text(prompt)
    arguments = ["checkpoint=runs/a", "max_new_tokens=16", "seed=3", "num_samples=3", "format=jsonl"]
    ways = []
    for word in ("prompt_file=prompt.txt", "prompt_file=-", f"prompt={prompt}"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
        code, out, _ = run_here("generate.py", *arguments, word, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0
        rows = [json.loads(line) for line in out.splitlines()]
        ways.append([(row["prompt"], row["sample"], row["tokens"]) for row in rows])
    assert ways[0] == ways[1] == ways[2]
    assert [(text, sample) for text, sample, _ in ways[0]] == [(prompt, 0), (prompt, 1), (prompt, 2)]
    assert len({tuple(tokens) for _, _, tokens in ways[0]}) > 1


def test_generate_ends_at_a_stop_string(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["checkpoint=runs/a", "prompt=def ", "seed=1", "max_new_tokens=40", "format=jsonl"]
    _, out, _ = run_here("generate.py", *arguments, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    free = json.loads(out)["text"]
    stop = next(character for character in free[5:] if character.isalnum())
    _, out, _ = run_here(
        "generate.py", *arguments, f'stop=["{stop}"]', folder=trained, monkeypatch=monkeypatch, capsys=capsys
    )
    result = json.loads(out)
    assert (result["text"], result["ended"]) == (free[: free.index(stop)], "stop")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=nowhere"], "nowhere"),
        (["checkpoint=runs/a", "top_p=3"], "top_p"),
        (["checkpoint=runs/a", "max_new_tokens=0"], "max_new_tokens=0: must be at least 1"),
        (["checkpoint=runs/a", "device=cuda:99"], "device=cuda:99"),
        (["checkpoint=runs/a", "prompt=x", "prompt_file=y"], "prompt and prompt_file are both given"),
        (["checkpoint=runs/a", "prompt_file=nowhere.txt"], "prompt_file=nowhere.txt: cannot be read"),
        (["checkpoint=runs/a", "prompt_file=runs/a/latin.txt"], "is no UTF-8"),
        (["checkpoint=runs/a", "num_samples=0"], "num_samples=0: must be at least 1"),
        (["checkpoint=runs/a", "format=json"], "format=json"),
        (["checkpoint=runs/a", 'stop=[""]'], "stop string is empty"),
        (["checkpoint=runs/a", "temperature=-1"], "temperature=-1"),
        (["prompt=x"], "checkpoint: missing"),
    ],
)
def test_generates_mistakes(
    arguments: list[str],
    message: str,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (trained / "runs" / "a" / "latin.txt").write_bytes(b"caf\xe9")
    code, out, err = run_here("generate.py", *arguments, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err


def test_a_torn_checkpoint_is_one_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = find_latest(trained / "runs" / "a" / "checkpoints")
    assert source is not None
    torn = tmp_path / "torn"
    shutil.copytree(source, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, out, err = run_here(
        "generate.py", f"checkpoint={torn}", folder=trained, monkeypatch=monkeypatch, capsys=capsys
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "model.safetensors" in err


def test_chat_replies(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f(x):\n/save talk.state\n"))
    arguments = ["checkpoint=runs/a", "mode=unfused", "max_new_tokens=8"]
    code, out, err = run_here("chat.py", *arguments, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err) == (0, "")
    assert "saved 1" in out
    assert BrainState.load(trained / "talk.state").lanes == 1


@pytest.mark.parametrize("script", ["generate.py", "chat.py"])
def test_int8_weights_are_of_one_mode(
    script: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["checkpoint=runs/a", "mode=unfused", "weights=int8"]
    code, out, err = run_here(script, *arguments, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out) == (2, "")
    assert err == "error: weights=int8: is for mode=fused, not unfused; change the mode or leave it out\n"


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "generate.py", "chat.py", "prepare_data.py"])
def test_ctrl_c_while_importing_is_no_traceback(script: str, tmp_path: Path) -> None:
    """With a neurogen that takes for ever to import."""
    (tmp_path / "neurogen").mkdir()
    (tmp_path / "neurogen" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "scripts" / script)]
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, as do its own
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, ours)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGINT, "")


@pytest.mark.parametrize("script", ["evaluate.py", "generate.py"])
def test_an_empty_checkpoint_is_not_the_folder_one_is_in(
    script: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = trained / "runs" / "a"
    code, out, err = run_here(script, "checkpoint=", folder=inside, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out) == (2, "")
    assert err == "error: checkpoint is empty; give a run directory or a checkpoints/step-... folder\n"


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run_process("train.py", "model.embedding_dim=wide", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: model.embedding_dim: value 'wide' of type 'str' could not be converted to Integer\n")
    assert list(tmp_path.iterdir()) == []


def test_replay_runs_a_bundle_and_refuses_what_is_none(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("neurogen.training.recorder.plot_run", lambda path: [])
    arguments = ["experiment=test", "data=text", "data.path=notes.txt", "optimizer.lr=1e30", "optimizer.weight_decay=0"]
    arguments += ["run_dir=runs/stuck", "trainer.max_skipped_in_a_row=1", "trainer.evaluate_every=0"]
    arguments += ["trainer.clip_norm=1e30", "schedule.warmup=0", "trainer.sample_every=0"]
    code, _, err = run_here("train.py", *arguments, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: trainer.max_skipped_in_a_row=1: 1 steps in a row were skipped")
    bundle = err.split("bundle=")[1].strip()
    code, out, _ = run_here(
        "replay.py", f"bundle={bundle}", "device=cpu", folder=trained, monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 0
    assert "first non-finite: " in out
    code, out, err = run_here("replay.py", "bundle=runs/a", folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out) == (2, "")
    assert "is a checkpoint without a batch" in err


def test_diagnose_watches_a_checkpoint(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["what=activity", "checkpoint=runs/a", "text=notes.txt", "sequence=20", "out=watched"]
    code, out, err = run_here("diagnose.py", *arguments, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err) == (0, "")
    assert "half-life" in out
    result = json.loads((trained / "watched" / "activity-checkpoint.json").read_text())
    assert result["checkpoint"] == "runs/a"
    config = load_checkpoint(str(trained / "runs" / "a")).metadata["config"]
    assert result["embedding_dim"] == config["model"]["embedding_dim"]
    assert 0 < result["activity"]["loss"] < 6


def test_a_diagnosis_becomes_the_table_of_the_readme(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("neurogen.diagnosis.measure.TIMED_SECONDS", 0.01)
    sizes = ["model.embedding_dim=8", "model.column_width=4", "model.head_width=4", "vocab_size=7", "sequence=6"]
    arguments = [*sizes, "task=train", "mode=unfused,naive", "model=base", "out=measured", "device=cpu"]
    here = {"folder": trained, "monkeypatch": monkeypatch, "capsys": capsys}
    code, _, err = run_here("diagnose.py", *arguments, **here)
    assert (code, err) == (0, "")
    shutil.copy(ROOT / "README.md", trained / "README.md")
    arguments = ["result=measured/modes-base.json", "into=README.md"]
    for _ in range(2):  # the second replaces the first
        assert run_here("report_modes.py", *arguments, **here) == (0, "", "")
        text = (trained / "README.md").read_text()
        table = text.split("<!-- modes -->\n")[1].split("<!-- /modes -->\n")[0]
        assert [line.split(" | ")[0].strip("| ") for line in table.splitlines() if line.startswith("| ")][2:] == [
            "earlier system, measured",
            "earlier system, planned",
            "`mode=naive`",
            "`mode=unfused`",
        ]
        assert "(width 8, fp32), 6 tokens" in table
    without = text.replace(table, "")
    original = (ROOT / "README.md").read_text()
    assert without.split("<!-- modes -->")[0] == original.split("<!-- modes -->")[0]
    assert without.split("<!-- /modes -->")[1] == original.split("<!-- /modes -->")[1]


def test_report_modes_names_what_it_cannot_read(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["result=none.json"], "no result file at none.json"),
        (["result=none.json", "task=dream"], "task is 'dream'"),
        (["result=none.json", "into=nowhere.md"], "no result file at none.json"),
        ([], "result: missing"),
    ):
        code, out, err = run_here("report_modes.py", *arguments, folder=trained, monkeypatch=monkeypatch, capsys=capsys)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
