"""Every YAML composes; what a user can get wrong is one line that names the key."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from neurogen.brain import BrainConfig
from neurogen.config.chat_config import ChatConfig
from neurogen.config.compose import CONF_DIR, build_config, compose_config, compose_node, config_to_dict
from neurogen.config.schema import GROUPS, AdamWConfig, Config, MuonConfig, WSDConfig
from neurogen.config.script_configs import EvaluateConfig, GenerateConfig
from neurogen.errors import UserError

# Choices that cannot stand alone, and the least they need.
NEEDS = {
    "data=text": ["data.path=notes.txt"],
    "data=shards": ["data.path=shards"],
    "data=mixture": ["data.sources={a: {kind: stdlib, split: documents, weight: 1}}"],
    "data=enwiki": ["data.path=a.jsonl.zst"],
    "experiment=enwiki_50s": ["data.path=a.jsonl.zst"],
    "experiment=enwiki_180s": ["data.path=a.jsonl.zst"],
    "experiment=shakespeare_char": ["data.path=a.txt"],
}
SWEEPS = ("sweep", "launcher")  # groups of conf/sweep.yaml
CHOICES = sorted(
    f"{path.parent.name}={path.stem}" for path in CONF_DIR.glob("*/[!_]*.yaml") if path.parent.name not in SWEEPS
)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_composes_and_lists_every_key(choice: str) -> None:
    tree = compose_node([choice, *NEEDS.get(choice, [])])
    config = build_config(tree, Config)
    group, name = choice.split("=")
    if group in ("mode", "optimizer", "schedule", "logger", "learning"):
        assert getattr(config, group).name == name
    # A key missing from the YAML could not be overridden from the command line.
    if group != "experiment" and choice != "logger=none":  # which has nothing to set
        schema = GROUPS[group][tree[group].name] if isinstance(GROUPS[group], dict) else GROUPS[group]
        assert set(tree[group]) == {field.name for field in dataclasses.fields(schema)}


def test_the_groups_folders_are_the_schema() -> None:
    folders = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "experiment", "tuned"}


@pytest.mark.parametrize(("experiment", "seconds"), [("enwiki_50s", 50), ("enwiki_180s", 180)])
@pytest.mark.parametrize("model", ["small", "gpt", "lstm"])
def test_the_byte_benchmark_is_the_same_for_all_but_what_is_tuned(experiment: str, seconds: int, model: str) -> None:
    """A run ends with its time and a rate of zero, and looks at itself once, at the end; the model's own file comes
    after the experiment and before the command line."""
    words = [f"model={model}", f"experiment={experiment}", "seed=3", "data.path=a.jsonl.zst"]
    config = compose_config(words)
    assert (config.data.lanes, config.data.window, config.trainer.max_seconds) == (64, 512, seconds)
    assert (config.schedule.by, config.schedule.final_scale) == ("seconds", 0.0)
    every = ("evaluate_every", "sample_every", "checkpoint_every")
    assert [getattr(config.trainer, key) for key in every] == [0, 0, 0]
    assert config.trainer.evaluate_tokens <= 500_000
    tuned = OmegaConf.load(CONF_DIR / "tuned" / experiment / f"{model}.yaml").optimizer
    assert {key: getattr(config.optimizer, key) for key in tuned} == dict(tuned)
    assert compose_config([*words, "optimizer.lr=0.5"]).optimizer.lr == 0.5


def test_every_tuned_file_belongs_to_an_experiment_and_a_model() -> None:
    for path in (CONF_DIR / "tuned").glob("*/*"):
        assert (CONF_DIR / "experiment" / f"{path.parent.name}.yaml").exists()
        assert (CONF_DIR / "model" / path.name).exists()


def test_yaml_values_are_the_schemas_defaults_where_both_give_one() -> None:
    config = compose_config(["model=nano", "mode=auto"])
    assert config.model == BrainConfig()
    assert compose_config(["optimizer=adamw"]).optimizer == AdamWConfig()
    assert compose_config(["optimizer=muon"]).optimizer == MuonConfig()
    assert compose_config(["schedule=wsd"]).schedule == WSDConfig()


def test_model_sizes() -> None:
    small, base = compose_config(["model=small"]).model, compose_config(["model=base"]).model
    depths = {"wernicke": 1, "hippocampus": 2, "pfc": 2, "broca": 1}
    assert (small.embedding_dim, small.column_width, small.depths) == (512, 64, depths)
    assert (base.embedding_dim, base.column_width, base.depths) == (1536, 128, depths)


def test_the_command_line_wins_over_an_experiment() -> None:
    config = compose_config(["experiment=quick", "data.lanes=8", "optimizer=muon", "trainer.max_seconds=5"])
    assert (config.data.lanes, config.optimizer.name, config.trainer.max_seconds) == (8, "muon", 5.0)


def test_a_saved_config_reads_back_the_same() -> None:
    config = compose_config(["experiment=quick", "optimizer=muon", "data=text", "data.path=[a.txt,b.txt]"])
    assert build_config(config_to_dict(config), Config) == config


def test_a_saved_config_cannot_name_code_to_run() -> None:
    tree = config_to_dict(compose_config())
    tree["optimizer"]["_target_"] = "os.system"
    with pytest.raises(UserError, match=r"optimizer\._target_: unknown key"):
        build_config(tree, Config)


ERRORS = {
    "optimizer=foo": "optimizer=foo: no such choice; choose one of adamw, muon",
    "optimizer=null": "optimizer=null: .*adamw, muon",
    "optimizer.lrr=3": r"optimizer\.lrr: unknown key; did you mean optimizer\.lr\?",
    "optimzer=adamw": r"optimzer: unknown key; did you mean optimizer\?",
    "+surprise=1": "surprise: unknown key",
    "+model.depth=1": r"model\.depth: unknown key",
    "~optimizer": "optimizer: missing",
    "seed=abc": "seed: .*'abc'.*Integer",
    "seed=${nowhere}": "seed: .*nowhere",
    "seed=-1": "seed=-1: must be 0 or more",
    "seed=[1": r"seed=\[1: not a key=value",
    "data.lanes=abc": r"data\.lanes: .*'abc'",
    "data.lanes=0": r"data\.lanes is 0",
    "data=text": r"data\.path: missing",
    "model.embedding_dim=1.5": r"model\.embedding_dim: .*1\.5",
    "model.embedding_dim=100": r"model\.embedding_dim is 100.*model\.column_width = 64",
    "model.spike=foo": r"model\.spike is 'foo'.*graded, binary, smooth",
    "mode=warp": "mode=warp: no such choice; choose one of auto, fused, naive, pointer, preallocated, unfused",
    "mode.name=warp": r"mode\.name=warp: unknown",
    "learning=foo": "learning=foo: no such choice; choose one of bptt, local",
    "learning.dopamine=1": r"learning\.dopamine: the chosen learning has no such key; .*learning=local",
    "model.num_layers=2": r"model\.num_layers: the chosen model has no such key; .*model=gpt or lstm",
    "optimizer.lr=0": r"optimizer\.lr=0\.0: must be more than 0",
    "optimizer.moments=half": r"optimizer\.moments=half: .*float32, bfloat16",
    "optimizer.lr=nan": r"optimizer\.lr=nan: must be a finite number",
    "optimizer.momentum=0.9": r"optimizer\.momentum: the chosen optimizer has no such key; .*optimizer=muon",
    "+optimizer.momentum=0.9": r"optimizer\.momentum: the chosen optimizer has no such key",
    "schedule.by=tokens": r"schedule\.by=tokens: needs trainer\.max_tokens",
    "schedule.warmup=1": r"schedule\.warmup=1\.0: must be less than 1",
    "trainer.max_steps=null": r"trainer\.max_steps: a run needs an end",
    "trainer.max_steps=0": r"trainer\.max_steps=0: must be more than 0",
    "trainer.accumulation=3": r"trainer\.accumulation=3: must divide data\.lanes=16",
    "trainer.dtype=fp8": r"trainer\.dtype=fp8: unknown",
    "trainer.clip_norm=-1": r"trainer\.clip_norm=-1\.0",
    "trainer.sample_prompts=3": r"trainer\.sample_prompts: ",
    "logger.mode=maybe": r"logger\.mode=maybe: unknown",
    "experiment=foo": "experiment=foo: no such choice; choose one of .*quick.*test",
}


def test_moments_are_not_rounded_where_that_would_stop_them() -> None:
    assert compose_config(["optimizer.moments=bfloat16", "optimizer.beta2=0.99"]).optimizer.moments == "bfloat16"
    with pytest.raises(UserError, match=r"optimizer\.moments=bfloat16: .* beta of 0\.999; use betas of at most 0\.99"):
        compose_config(["optimizer.moments=bfloat16", "optimizer.beta2=0.999"])


@pytest.mark.parametrize("override", ERRORS)
def test_an_error_is_one_line_that_names_the_key(override: str) -> None:
    with pytest.raises(UserError, match=ERRORS[override]) as caught:
        compose_config([override])
    assert "\n" not in str(caught.value)


def test_warmup_and_decay_together_exceed_the_run() -> None:
    with pytest.raises(UserError, match=r"schedule\.decay=0\.8: with schedule\.warmup=0\.3"):
        compose_config(["schedule=wsd", "schedule.decay=0.8", "schedule.warmup=0.3"])


@pytest.mark.parametrize(("name", "root"), [("evaluate", EvaluateConfig), ("generate", GenerateConfig)])
def test_the_other_scripts_configs_compose(name: str, root: type) -> None:
    tree = compose_node(["checkpoint=runs/x"], config_name=name)
    config = build_config(tree, root)
    assert config.checkpoint == "runs/x"
    assert config.mode.name == "auto"
    assert {*tree, "data"} == {field.name for field in dataclasses.fields(root)} | {"data"}
    with pytest.raises(UserError, match="checkpoint: missing"):
        build_config(compose_node([], config_name=name), root)


@pytest.mark.parametrize(("name", "root"), [("generate", GenerateConfig), ("chat", ChatConfig)])
def test_a_reply_is_drawn_from_int8_weights_or_none(name: str, root: type) -> None:
    assert build_config(compose_node(["checkpoint=x"], config_name=name), root).weights is None
    assert build_config(compose_node(["checkpoint=x", "weights=int8"], config_name=name), root).weights == "int8"
    with pytest.raises(UserError, match="weights=fp8"):
        build_config(compose_node(["checkpoint=x", "weights=fp8"], config_name=name), root)


def test_evaluation_takes_a_data_group() -> None:
    tree = compose_node(["checkpoint=x", "data=text", "data.path=a.txt"], config_name="evaluate")
    assert build_config(tree, EvaluateConfig).data.path == "a.txt"  # type: ignore[union-attr]


def test_verbatim_text_is_not_interpolated() -> None:
    tree = compose_node(["checkpoint=x"], config_name="generate")
    text = "f'${a}', [1, {2}]: ???"
    assert build_config(tree, GenerateConfig, verbatim={"prompt": text}).prompt == text


def test_hydra_keeps_to_itself() -> None:
    for name in ("config", "evaluate", "generate"):
        hydra = OmegaConf.load(CONF_DIR / f"{name}.yaml").hydra
        assert (hydra.output_subdir, hydra.job.chdir, hydra.run.dir) == (None, False, ".")
