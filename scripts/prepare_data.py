"""Tokenise text once into shards that training maps: `data=shards data.path=<out>`.

    python scripts/prepare_data.py out=shards data=text data.path='books/*.txt' data.tokenizer=bpe data.vocab_size=8192
    python scripts/prepare_data.py out=shards data=slimpajama data.path='/mnt/slim/*.jsonl.zst' data.max_chunks=null

Settings are key=value, as in the other scripts:
    out=DIR                  where the shards go (required); the same command again carries on after a kill
    workers=N                processes that tokenise (default: all cores); the result is the same for any number
    shard_tokens=N           most ids in a shard (default 67108864)
    long_documents=error     a document longer than a shard: error, or split into several
    data=GROUP data.KEY=V    what to read, as in training (default data=text)
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a traceback

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from neurogen.config.script import interrupts_raise
from neurogen.data import DataConfig
from neurogen.data.corpus import left_out
from neurogen.data.prepare import Progress, prepare_shards
from neurogen.data.sources import find_sources
from neurogen.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"
NUMBERS = ("workers", "shard_tokens")


def main(arguments: list[str]) -> int:
    interrupts_raise()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        own, config = parse(arguments)
        manifest = run(own, config)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command carries on after the last whole shard", file=sys.stderr)
        return 130
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        print(f"error: {reason}; then the same command carries on after the last whole shard", file=sys.stderr)
        return 2
    num_shards = sum(len(entries) for entries in manifest["shards"].values())
    tokens, documents = manifest["num_tokens"], manifest["num_documents"]
    print(f"{own['out']}: {num_shards} shards")
    for part in tokens:
        print(f"  {part}: {tokens[part]:,} tokens, {documents[part]:,} documents")
    if skipped := left_out(manifest["counts"]):
        print(f"  {skipped}")
    return 0


def parse(arguments: list[str]) -> tuple[dict[str, Any], DataConfig]:
    """This script's own settings, and the composed data group. UserError for a bad one."""
    own: dict[str, Any] = {"workers": os.cpu_count() or 1, "shard_tokens": 1 << 26, "long_documents": "error"}
    group, overrides = "text", []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is no setting; write key=value")
        if key == "data":
            group = value
        elif key.lstrip("+").startswith("data."):
            overrides.append(argument)
        elif key in NUMBERS:
            if not value.isdigit():
                raise UserError(f"{key} is {value!r}; it must be a whole number")
            own[key] = int(value)
        elif key in ("out", "long_documents"):
            own[key] = value
        else:
            raise UserError(
                f"{key!r} is no setting of this script; it knows out, {', '.join(NUMBERS)}, long_documents, data"
            )
    if not own.get("out"):
        raise UserError("out is missing; say where the shards go, e.g. out=shards")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose(f"data/{group}", overrides).data
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(f"data.{missing[0]} is missing; data={group} needs it, e.g. data.{missing[0]}=...")
    return own, DataConfig(**OmegaConf.to_container(composed, resolve=True))


def run(own: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Prepare with a progress bar: by files, since how much text a compressed file holds is not known beforehand."""
    sizes = {source.path: source.path.stat().st_size for source in find_sources(config)}
    before, total = {}, 0
    for path, size in sizes.items():
        before[path] = total
        total += size
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=total)

        def show(progress: Progress) -> None:
            text = f"{progress.tokens / 1e6:,.1f} M tokens, {progress.text_bytes / 1e6:,.1f} MB"
            bar.update(task, description=text, completed=before.get(progress.path, 0))

        manifest = prepare_shards(
            config,
            own["out"],
            shard_tokens=own["shard_tokens"],
            workers=own["workers"],
            long_documents=own["long_documents"],
            progress=show,
        )
        bar.update(task, completed=total)
    return manifest


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
