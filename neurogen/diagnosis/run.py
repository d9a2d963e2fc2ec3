"""The diagnosis as scripts/diagnose.py runs it: measure, print, write."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from neurogen.brain import BrainConfig
from neurogen.config.schema import ModeConfig
from neurogen.data import DataConfig, LaneBatches, build_corpus
from neurogen.diagnosis.activity import measure_activity
from neurogen.diagnosis.environment import describe_environment, missing_instruments
from neurogen.diagnosis.health import measure_health
from neurogen.diagnosis.health_plots import draw_health
from neurogen.diagnosis.measure import measure_mode, precision
from neurogen.diagnosis.options import Options
from neurogen.diagnosis.plots import plot_activity, plot_modes
from neurogen.diagnosis.tables import activity_table, cost_table, stage_table
from neurogen.diagnosis.tokenization import measure_tokenization
from neurogen.errors import UserError
from neurogen.model import NeuroGen
from neurogen.modes import resolve_mode
from neurogen.storage.files import write_atomically
from neurogen.training.samples import encode_prompt
from neurogen.training.trained import load_trained

Subject = Callable[[Options, torch.device, Path, Console], dict[str, Any]]
Write = Callable[[dict[str, Any]], None]  # puts what has been measured so far into the result file

DEFAULT_FOLDER = "runs/diagnosis"
FORMAT = "neurogen-diagnosis-1"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def diagnose(options: Options, console: Console | None = None) -> Path:
    """Run what the options ask for and return the result file. Raises UserError for what cannot be run."""
    console = console or Console()
    device = options.torch_device()
    folder = Path(options.out or DEFAULT_FOLDER)
    result = {
        "format": FORMAT,
        "what": options.what,
        "model": options.model_name,
        "embedding_dim": options.model.embedding_dim,
        "precision": options.precision,
        "environment": describe_environment(device),
    }
    path = folder / f"{options.what}-{options.model_name}.json"
    folder.mkdir(parents=True, exist_ok=True)

    def write(measured: dict[str, Any]) -> None:
        write_atomically(path, (json.dumps(result | measured, indent=2) + "\n").encode())

    subjects: dict[str, Subject] = {
        "modes": functools.partial(_modes, write=write),
        "activity": _activity,
        "health": _health,
        "tokenization": _tokenization,
    }
    write(subjects[options.what](options, device, folder, console))
    console.print(f"wrote {path}")
    return path


def _modes(options: Options, device: torch.device, folder: Path, console: Console, write: Write) -> dict[str, Any]:
    missing = missing_instruments(device)
    modes = [resolve_mode(name) for name in options.modes]
    if options.mode == "all" and device.type != "cuda":
        # At some seconds a token it would say nothing about anything.
        modes.remove("fused")
        missing.append("mode fused: without a GPU it runs in Triton's interpreter; name it to have it measured")
    input_ids = make_ids(options, device)
    rows: list[dict[str, Any]] = []
    measured = {"sequence": options.sequence, "lanes": options.lanes, "missing": missing, "rows": rows}
    new = make_model(options.model, options)
    for task, mode in itertools.product(options.tasks, modes):
        console.print(f"measuring {task} in mode {mode} ...")
        cost = measure_mode(
            copy.deepcopy(new).to(device),
            mode,
            task,
            input_ids,
            counted_tokens=options.counted_tokens,
            clocked_tokens=options.clocked_tokens,
            bf16=options.precision == "bf16",
        )
        rows.append(cost.as_dict())
        write(measured)  # at once: the slow modes take minutes, and a later one may be cut off
    for task in options.tasks:
        of_task = [row for row in rows if row["task"] == task]
        console.print(cost_table(of_task, task))
        console.print(stage_table(of_task, task))
    for line in missing:
        console.print(f"missing: {line}")
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"modes-{options.model_name}.png"
    plot_modes(rows, picture)
    console.print(f"wrote {picture}")
    return measured


def _activity(options: Options, device: torch.device, folder: Path, console: Console) -> dict[str, Any]:
    model, ids = _trained_model(options) if options.checkpoint is not None else _new_model(options, device)
    with precision(device, bf16=options.precision == "bf16"):
        activity = measure_activity(model, ids)
    console.print(activity_table(activity.as_dict()))
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"activity-{options.model_name}.png"
    plot_activity(activity, picture)
    console.print(f"wrote {picture}")
    embedding_dim = model.config.embedding_dim
    return {"checkpoint": options.checkpoint, "embedding_dim": embedding_dim, "activity": activity.as_dict()}


def _health(options: Options, device: torch.device, folder: Path, console: Console) -> dict[str, Any]:
    """What a run draws at its end, of any checkpoint, on its own validation text."""
    assert options.checkpoint is not None, "the options have checked it"
    trained = load_trained(
        options.checkpoint, mode=ModeConfig("auto"), device=options.device, dtype=DTYPES[options.precision]
    )
    data = trained.config.data
    stream = build_corpus(data).validation
    health = measure_health(trained.model, stream, lanes=data.lanes, window=data.window)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in draw_health(health, folder):
        console.print(f"wrote {picture}")
    return {"checkpoint": options.checkpoint, "step": trained.step, "health": health.as_dict()}


def _new_model(options: Options, device: torch.device) -> tuple[NeuroGen, Tensor]:
    """A new model of bytes and the text's ids `[T]`."""
    ids = torch.tensor(list(_read_text(options)[: options.sequence]), dtype=torch.int64)
    if int(ids.max()) >= options.vocab_size:
        raise UserError(f"vocab_size is {options.vocab_size}; a text of bytes needs at least 256")
    return make_model(options.model, options).to(device), ids


def _trained_model(options: Options) -> tuple[NeuroGen, Tensor]:
    """The checkpoint's model and the text's ids `[T]` as it was trained to read them."""
    assert options.checkpoint is not None
    trained = load_trained(
        options.checkpoint, mode=ModeConfig("unfused"), device=options.device, dtype=DTYPES[options.precision]
    )
    if not isinstance(trained.model, NeuroGen):
        raise UserError(f"{options.checkpoint}: holds no brain, and what=activity watches one")
    # A token stands for some bytes, so so many characters are tokens enough.
    text = _read_text(options).decode(errors="replace")[: 64 * options.sequence]
    ids = encode_prompt(trained.tokenizer, text, starts_documents=trained.starts_documents)
    return trained.model, ids[0, : options.sequence]


def _tokenization(options: Options, device: torch.device, folder: Path, console: Console) -> dict[str, Any]:
    corpus = build_corpus(
        DataConfig(
            lanes=options.lanes,
            window=options.sequence,
            split="documents",
            encoding_errors="skip",
            empty_documents="skip",
        )
    )
    mode = resolve_mode("auto" if options.mode == "all" else options.modes[0])
    model = NeuroGen(options.model, vocab_size=corpus.tokenizer.vocab_size, mode=mode).to(device)
    batches = LaneBatches(corpus.train, lanes=options.lanes, window=options.sequence, seed=options.seed)
    autocast = functools.partial(precision, device, bf16=options.precision == "bf16")
    rates = measure_tokenization(model, corpus.tokenizer, _read_text(options), iter(batches), autocast=autocast)
    for name in ("tokenizer", "pipeline", "model"):
        console.print(f"{name:>10}: {rates[name]:,.0f} tokens/s")
    console.print(
        f"serving a batch takes {100 * rates['pipeline_share']:.2f} % of the time of training on it in mode {mode}"
    )
    return {"mode": mode, "tokenization": rates}


def make_model(config: BrainConfig, options: Options) -> NeuroGen:
    """A new model on the CPU."""
    torch.manual_seed(options.seed)
    return NeuroGen(config, vocab_size=options.vocab_size)


def make_ids(options: Options, device: torch.device) -> Tensor:
    """`[B, T + 1]` ids drawn from the seed."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.lanes, options.sequence + 1)
    return torch.randint(options.vocab_size, shape, generator=generator).to(device)


def _read_text(options: Options) -> bytes:
    if not options.text:
        return inspect.getsource(textwrap).encode()
    path = Path(options.text)
    if not path.is_file():
        raise UserError(f"text is {options.text}, and there is no such file")
    text = path.read_bytes()
    if not text:
        raise UserError(f"text is {options.text}, and that file is empty")
    return text
