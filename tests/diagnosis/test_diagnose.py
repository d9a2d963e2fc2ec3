"""The script: what it prints, writes and refuses."""

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from neurogen import NeuroGen, UserError
from neurogen.config.script import run_script
from neurogen.diagnosis import run
from neurogen.diagnosis.activity import measure_activity
from neurogen.diagnosis.comparison import comparison, load_result
from neurogen.diagnosis.measure import WARM_UP_TOKENS, ModeCost, measure_mode
from neurogen.diagnosis.options import VERBATIM, Options, name_model
from neurogen.diagnosis.run import diagnose
from neurogen.diagnosis.tokenization import measure_tokenization
from neurogen.diagnosis.usage import UsageMeter


def parse_options(words: list[str]) -> Options:
    """The options scripts/diagnose.py makes of a command line."""
    taken: list[Options] = []
    code = run_script(
        taken.append, config_name="diagnose", root=Options, verbatim=VERBATIM, prepare=name_model, arguments=words
    )
    assert code == 0
    return taken[0]


@pytest.fixture(scope="module")
def result_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small diagnosis of two modes at both tasks."""
    folder = tmp_path_factory.mktemp("diagnosis")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neurogen.diagnosis.measure.TIMED_SECONDS", 0.01)
        words = ["mode=naive,preallocated", "sequence=8", "counted_tokens=4", "vocab_size=7", f"out={folder}"]
        words += ["clocked_tokens=3"]
        words += ["model.embedding_dim=8", "model.column_width=4", "model.head_width=4"]
        console = Console(file=io.StringIO(), width=120)
        path = diagnose(parse_options(words), console)
        text = console.file.getvalue()
    (folder / "printed.txt").write_text(text)
    return path


def test_writes_json_a_plot_and_tables(result_path: Path) -> None:
    result = json.loads(result_path.read_text())
    assert [(row["task"], row["mode"]) for row in result["rows"]] == [
        ("train", "naive"),
        ("train", "preallocated"),
        ("generate", "naive"),
        ("generate", "preallocated"),
    ]
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert sum(row["stage_seconds"].values()) == pytest.approx(row["clocked_seconds"])
        assert row["clocked_tokens"] == 3 < row["tokens"]
    naive, preallocated = result["rows"][:2]
    assert naive["counted_tokens"] == 4
    assert naive["sequence_counts"]["synchronisations"] == naive["tokens"] + 1  # one a token, and the step's own
    assert naive["sequence_counts"]["kernel_launches"] == naive["counts"]["kernel_launches"]  # None, or one count
    assert naive["counts"]["synchronisations"] - naive["counts_of_half"]["synchronisations"] == 2
    assert preallocated["counts"]["host_allocations"] == preallocated["counts_of_half"]["host_allocations"]
    assert naive["churned_megabytes"] > preallocated["churned_megabytes"]
    assert (result_path.parent / "modes-nano.png").read_bytes().startswith(b"\x89PNG")
    printed = (result_path.parent / "printed.txt").read_text()
    for text in (
        "seconds a sequence",
        "tokens/s",
        "CPU %",
        "cognitive step",
        "synchronisations",
        "missing: no CUDA GPU",
    ):
        assert text in printed or (text.startswith("missing") and torch.cuda.is_available())


def test_modes_measured_before_one_that_fails_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = run.measure_mode

    def until_unfused(model: NeuroGen, mode: str, *rest: Any, **options: Any) -> ModeCost:
        if mode == "unfused":
            raise KeyboardInterrupt
        return measure(model, mode, *rest, **options)

    monkeypatch.setattr("neurogen.diagnosis.measure.TIMED_SECONDS", 0.01)
    monkeypatch.setattr(run, "measure_mode", until_unfused)
    words = ["task=train", "sequence=2", "vocab_size=7", f"out={tmp_path}"]
    words += ["model.embedding_dim=8", "model.column_width=4", "model.head_width=4"]
    with pytest.raises(KeyboardInterrupt):
        diagnose(parse_options(words), Console(file=io.StringIO()))
    rows = load_result(tmp_path / "modes-nano.json")["rows"]
    assert [row["mode"] for row in rows] == ["naive", "pointer", "preallocated"]


def test_what_is_timed_is_training(make_model: Callable[..., NeuroGen], monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 too the weights of a step are those the step before left: losses are the trainer's own."""
    monkeypatch.setattr("neurogen.diagnosis.measure.TIMED_SECONDS", 0.0)
    ids = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))
    losses: list[float] = []

    def timed(step: Callable[[], float], device: torch.device) -> tuple[list[float], UsageMeter]:
        losses.extend(step() for _ in range(3))
        return [1.0], UsageMeter(device)

    monkeypatch.setattr("neurogen.diagnosis.measure._timed", timed)
    measure_mode(make_model(dtype=torch.float32), "unfused", "train", ids, counted_tokens=2, bf16=True)

    model = make_model(dtype=torch.float32)
    expected = []
    for each in (ids[:, : WARM_UP_TOKENS + 1], *[ids] * 3):
        # Every sequence has an optimiser of its own; that of the long one goes on.
        if len(expected) < 2:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
            optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(each[:, :-1], target_ids=each[:, 1:]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected[1:], abs=2e-2)
    assert expected[1] - expected[3] > 0.1


def test_the_comparison_has_the_earlier_system_and_ours(result_path: Path) -> None:
    table = comparison(load_result(result_path), "train").splitlines()
    assert table[0] == "|  | time for 8 tokens | tokens/s | CPU % | GPU % | MB churned per sequence |"
    assert table[2] == "| earlier system, measured | 50 s | 10 | 100 | 10 | - |"
    assert table[3] == "| earlier system, planned | 0.2 s | 2,500 | 15 | 90 | 0.01 |"
    assert table[4].startswith("| `mode=naive` | ")
    assert table[5].startswith("| `mode=preallocated` | ")
    assert "8 tokens" in table[-1]


def test_a_file_that_is_no_result_is_refused(tmp_path: Path, result_path: Path) -> None:
    with pytest.raises(UserError, match="no result file"):
        load_result(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text(result_path.read_text()[:50])
    with pytest.raises(UserError, match="is not a result file"):
        load_result(tmp_path / "cut.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match="no result of scripts/diagnose"):
        load_result(tmp_path / "other.json")
    with pytest.raises(UserError, match="no task 'dream'; it has generate, train"):
        comparison(load_result(result_path), "dream")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["colour=red"], "colour: unknown key"),
        (["sequence"], "sequence: not a key=value"),
        (["sequence=ten"], "sequence: value 'ten'"),
        (["sequence=1"], "sequence is 1; it must be at least 2"),
        (["mode=naive,quick"], "mode is 'quick'"),
        (["model=huge"], "model=huge: no such choice; choose one of base, gpt, lstm, nano, small"),
        (["model.column_width=7"], "not a multiple of model.column_width = 7"),
        (["what=dreams"], "what is 'dreams'"),
        (["precision=int4"], "precision is 'int4'"),
        (["checkpoint=runs/a"], "a checkpoint is for what=activity and what=health"),
        (["what=health"], "what=health: needs a checkpoint"),
    ],
)
def test_bad_settings_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_script(
        lambda options: pytest.fail("ran"),
        config_name="diagnose",
        root=Options,
        verbatim=VERBATIM,
        prepare=name_model,
        arguments=words,
    )
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_sizes_come_from_the_model_group() -> None:
    options = parse_options(["model=base", "mode=naive,unfused"])
    assert (options.model.embedding_dim, options.model.column_width, options.model_name) == (1536, 128, "base")
    assert options.modes == ("naive", "unfused")
    assert parse_options(["model=small", "model_name=mine"]).model_name == "mine"


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="device is 'abacus'"):
        Options(device="abacus").torch_device()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA GPU"):
            Options(device="cuda").torch_device()


@pytest.mark.parametrize("spike", ["graded", "smooth"])
def test_activity_of_known_neurons(spike: str, make_model: Callable[..., NeuroGen]) -> None:
    """Neurons pushed far up are saturated, pushed far down silent (a smooth unit is both, at -1); half-lives and gates
    are those of the weights."""
    model = make_model(spike=spike, homeostasis=0.0)
    with torch.no_grad():
        for layer, drive in ((model.brain.wernicke[0], 1e4), (model.brain.broca[0], -1e4)):
            layer.in_proj.weight.zero_()
            layer.lateral_weight.zero_()
            layer.drive_bias.fill_(drive)
        model.brain.hippocampus[0].forget.weight.zero_()
        model.brain.hippocampus[0].forget.bias.fill_(torch.logit(torch.tensor(0.5 ** (1 / 40))))
        model.brain.basal_ganglia.go.weight.zero_()
        model.brain.basal_ganglia.go.bias.fill_(0.0)
        model.decoder.weight.zero_()
    activity = measure_activity(model, torch.arange(9))
    assert activity.saturated == {"wernicke.0": 1.0, "broca.0": 1.0 if spike == "smooth" else 0.0}
    assert activity.silent == {"wernicke.0": 0.0, "broca.0": 1.0}
    assert activity.firing_rate == {"wernicke.0": 1.0, "broca.0": 0.0}
    torch.testing.assert_close(activity.half_lives["hippocampus.0"], torch.full((4,), 40.0).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(activity.go_rate, torch.full((3,), 0.5))
    assert activity.spikes["wernicke.0"].shape == (9, 24)
    assert list(activity.entropy) == ["thalamus", "wernicke.0", "hippocampus.0", "pfc.0", "broca.0"]
    assert list(activity.entropy.values()) == pytest.approx([torch.log(torch.tensor(11.0)).item()] * 5)


def test_activity_sees_what_the_model_does(make_model: Callable[..., NeuroGen]) -> None:
    model = make_model()
    ids = torch.randint(11, (1, 8), generator=torch.Generator().manual_seed(0))
    activity = measure_activity(model, ids[0])
    out = model(ids[:, :-1], target_ids=ids[:, 1:])
    assert activity.loss == pytest.approx(float(out.loss.detach()), abs=1e-5)
    whole = model(ids).health
    assert activity.firing_rate["wernicke.0"] == pytest.approx(float(whole["wernicke/firing_rate"]), abs=1e-6)
    assert float(activity.go_rate.mean()) == pytest.approx(float(whole["go_rate"]), abs=1e-5)
    with pytest.raises(UserError, match="at least 2"):
        measure_activity(model, ids[0, :1])


def test_activity_prints_and_draws(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("the brain reads this line")
    console = Console(file=io.StringIO(), width=120)
    words = ["what=activity", "sequence=12", f"text={text}", f"out={tmp_path}"]
    path = diagnose(parse_options(words), console)
    assert json.loads(path.read_text())["activity"]["half_lives"]["pfc.0"][0] == pytest.approx(300, rel=0.01)
    assert (tmp_path / "activity-nano.png").read_bytes().startswith(b"\x89PNG")
    printed = console.file.getvalue()
    assert "half-life" in printed
    gates = json.loads(path.read_text())["activity"]["go_rate"]
    broca = next(line for line in printed.splitlines() if "broca.0" in line)
    assert f"{100 * gates[1]:.0f} %" in broca.split("│")[5]
    assert "%" not in next(line for line in printed.splitlines() if "wernicke.0" in line).split("│")[5]
    with pytest.raises(UserError, match="no such file"):
        diagnose(parse_options(["what=activity", f"text={tmp_path}/none.txt"]), console)


def test_tokenization_prints_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurogen.diagnosis.tokenization.MEASURE_SECONDS", 0.02)
    console = Console(file=io.StringIO(), width=120)
    sizes = ["model.embedding_dim=8", "model.column_width=4", "model.head_width=4", "sequence=8", "device=cpu"]
    path = diagnose(parse_options(["what=tokenization", "mode=pointer", f"out={tmp_path}", *sizes]), console)
    result = json.loads(path.read_text())
    assert result["mode"] == "pointer"
    rates = result["tokenization"]
    assert rates["pipeline_share"] == pytest.approx(rates["model"] / rates["pipeline"])
    for text in (f"model: {rates['model']:,.0f} tokens/s", "in mode pointer"):
        assert text in console.file.getvalue()


def test_tokenization_rates(make_model: Callable[..., NeuroGen], monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the pipeline is the model's rate over the pipeline's, and a slow pipeline is seen as one."""
    monkeypatch.setattr("neurogen.diagnosis.tokenization.MEASURE_SECONDS", 0.05)
    ids = torch.zeros(1, 4, dtype=torch.int64)

    def batches(seconds: float) -> Iterator[SimpleNamespace]:
        while True:
            time.sleep(seconds)
            yield SimpleNamespace(input_ids=ids, target_ids=ids)

    tokenizer = SimpleNamespace(encode=lambda text: list(text))
    quick, slow = (
        measure_tokenization(make_model(), tokenizer, b"some text", batches(seconds)) for seconds in (0.0, 0.02)
    )
    assert slow["pipeline"] < 4 / 0.02
    assert quick["pipeline"] > 10 * slow["pipeline"]
    assert quick["pipeline_share"] == pytest.approx(quick["model"] / quick["pipeline"])
    assert slow["pipeline_share"] > quick["pipeline_share"]
    assert quick["tokenizer"] > 1000
