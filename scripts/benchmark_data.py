"""How fast text becomes tokens, beside the `tokenizers` library alone, and how fast a reader serves them.

    python scripts/benchmark_data.py [out=docs/benchmarks/data.json] [megabytes=24] [repeats=5] [workers=2]

Tokenising: the Python standard library's text, repeated to `megabytes`, with a byte-level BPE of 4096. `tokenizers` is
given a list of strings in memory; the others read a .jsonl, and write what training maps. All may use every core.
Reading: 100 M tokens of uint16 in documents of about 600, from the page cache, in one file or eight shards, B=64,
T=512; `workers` processes read their share of the lanes each, at the same time, and their rates are added up. `window`
is ids as they are stored, which travel to a GPU; `batch` is what a step on the CPU gets: input, target and document
start in memory of their own, int64 and bool. A row holds op, provider, shape, the rate by the wall clock (median, p20,
p80, best) and `per_cpu_second`, tokens over processor time of all processes, their starts included: what is left of a
rate on a busy machine. The load when the run began and ended is kept too.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from neurogen.data import BpeTokenizer, DataConfig, LaneBatches, RandomBatches, TokenStream, build_corpus
from neurogen.data.batches import Batches
from neurogen.data.prepare import prepare_shards, write_json
from neurogen.data.shards import ShardedTokens, ShardStream
from neurogen.data.shuffle import ShuffledLaneBatches
from neurogen.data.sources import stdlib_sources
from neurogen.errors import UserError
from neurogen.machine import machine_facts

READ_TOKENS, READ_BATCHES, LANES, WINDOW = 100_000_000, 4000, 64, 512
NUM_SHARDS = {"1 file": 1, "8 shards": 8}
START = 50_000
READERS: dict[str, type[Batches]] = {"lanes": LaneBatches, "shuffled": ShuffledLaneBatches, "random": RandomBatches}


def main(arguments: list[str]) -> int:
    settings: dict[str, Any] = {"out": "docs/benchmarks/data.json", "megabytes": 24, "repeats": 5, "workers": 2}
    try:
        for argument in arguments:
            key, _, value = argument.partition("=")
            if key not in settings or (key != "out" and not value.isdigit()):
                raise UserError(f"{argument!r} is no setting here; there are {', '.join(settings)}")
            settings[key] = value if key == "out" else int(value)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as directory:
        rows = tokenize_rows(Path(directory), **{key: settings[key] for key in ("megabytes", "repeats", "workers")})
        rows += read_rows(Path(directory), repeats=settings["repeats"], workers=settings["workers"])
    load.append(os.getloadavg()[0])
    facts = machine_facts()
    versions = {key: facts[key] for key in ("python", "torch", "commit")}
    versions |= {"numpy": np.__version__, "tokenizers": tokenizers.__version__}
    for one in rows:
        rates = f"{one['median'] / 1e6:9.2f} M tokens/s {one['per_cpu_second'] / 1e6:9.2f} M/cpu-s"
        print(f"{one['op']:9} {one['provider']:28} {rates}  {one['shape']}")
    Path(settings["out"]).parent.mkdir(parents=True, exist_ok=True)
    device = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "load": load}
    write_json(Path(settings["out"]), {"unit": "tokens/s", "device": device, "versions": versions, "rows": rows})
    return 0


def tokenize_rows(directory: Path, *, megabytes: int, repeats: int, workers: int) -> list[dict[str, Any]]:
    """Rates of the library and of both ways to tokenise here, measured in turn: a busy machine slows all alike."""
    texts = [source.path.read_bytes().decode("utf-8", errors="replace") for source in stdlib_sources()]
    texts = [text for text in texts if text]
    size = sum(len(text.encode()) for text in texts)
    tokenizer = BpeTokenizer.train(iter(texts[:150]), vocab_size=4096)
    tokenizer.save(directory / "tokenizer")
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    texts = texts * max(1, round(megabytes * 1e6 / size))
    path = directory / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    num_tokens = sum(len(library.encode(text).ids) for text in texts)
    config = {"kind": "text", "path": str(path), "tokenizer": "file", "tokenizer_path": str(directory / "tokenizer")}
    config |= {"split": "documents"}
    runs = iter(range(10**6))
    ways: dict[str, Callable[[], Any]] = {
        "tokenizers": lambda: library.encode_batch_fast(texts, add_special_tokens=False),
        "neurogen build_corpus": lambda: build_corpus(DataConfig(**config), directory / f"cache{next(runs)}"),
        f"neurogen prepare workers={workers}": lambda: prepare_shards(
            DataConfig(**config), directory / f"shards{next(runs)}", workers=workers
        ),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began, cpu = time.perf_counter(), cpu_seconds()
            way()
            rates[name].append((num_tokens / (time.perf_counter() - began), num_tokens / (cpu_seconds() - cpu)))
    shape = f"{path.stat().st_size / 1e6:.0f} MB, {len(texts)} documents, V=4096"
    return [row("tokenize", name, shape, values) for name, values in rates.items()]


def read_rows(directory: Path, *, repeats: int, workers: int) -> list[dict[str, Any]]:
    """Rates of serving windows (ids as they are stored) and whole batches (int64), by each order of reading."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, START, READ_TOKENS, dtype=np.uint16)
    lengths = rng.integers(100, 1100, READ_TOKENS // 600)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    offsets = offsets[offsets < READ_TOKENS].astype(np.int64)
    tokens[offsets] = START
    tokens.tofile(directory / "tokens.bin")
    offsets.tofile(directory / "offsets.bin")
    rows = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_together, (context.Barrier(workers),)) as pool:
        for order in READERS:
            for what in ("window", "batch"):
                for files in NUM_SHARDS:
                    jobs = [(str(directory), order, what, files, rank, workers, repeats) for rank in range(workers)]
                    per_process = pool.map(measure_reader, jobs, chunksize=1)
                    shape = f"B={LANES}, T={WINDOW}, uint16, {files}, {what}, {workers} processes"
                    wall, cpu = np.sum(per_process, axis=0).T
                    rows.append(row("read", f"neurogen {order}", shape, list(zip(wall, cpu / workers))))
    return rows


_barrier: Any = None


def _start_together(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def measure_reader(job: tuple[str, str, str, str, int, int, int]) -> list[tuple[float, float]]:
    """Tokens a second, and a second of processor time, of one process that reads its share of the lanes."""
    directory, order, what, files, rank, world_size, repeats = job
    torch.set_num_threads(1)
    stream = read_stream(Path(directory), NUM_SHARDS[files])
    batches = READERS[order](stream, lanes=LANES, window=WINDOW, seed=1, rank=rank, world_size=world_size)
    read: Callable[[], Any] = batches.next_window if what == "window" else batches.__next__
    read()
    rates = []
    for _ in range(repeats):
        _barrier.wait()
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(READ_BATCHES):
            read()
        num_tokens = READ_BATCHES * WINDOW * (LANES // world_size)
        rates.append((num_tokens / (time.perf_counter() - began), num_tokens / (time.process_time() - cpu)))
    return rates


def read_stream(directory: Path, num_shards: int) -> TokenStream:
    """The tokens that `read_rows` wrote, as one stream or as shards of whole documents."""
    tokens = np.asarray(np.memmap(directory / "tokens.bin", dtype=np.uint16, mode="r"))
    tokens.max()  # into the page cache, and into this process
    offsets = np.fromfile(directory / "offsets.bin", dtype=np.int64)
    if num_shards == 1:
        return TokenStream(tokens, offsets, START, "f", "train")
    cuts = [0, *(int(part[0]) for part in np.array_split(offsets, num_shards)[1:]), len(tokens)]
    shards = []
    for begin, end in itertools.pairwise(cuts):
        own = offsets[(offsets >= begin) & (offsets < end)] - begin
        shards.append(TokenStream(tokens[begin:end], own, START, "f", "train"))
    sharded: Any = ShardedTokens([shard.tokens for shard in shards])
    return ShardStream(sharded, offsets, START, "f", "train", tuple(shards))


def row(op: str, provider: str, shape: str, rates: list[tuple[float, float]]) -> dict[str, Any]:
    """One result from rates by the wall clock and by processor time."""
    wall, cpu = np.array(rates).T
    p20, median, p80 = (float(np.percentile(wall, q)) for q in (20, 50, 80))
    speed = {"median": median, "p20": p20, "p80": p80, "best": float(wall.max())}
    speed["per_cpu_second"] = float(np.median(cpu))
    return {"op": op, "provider": provider, "shape": shape, **speed}


def cpu_seconds() -> float:
    """Processor time of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def cpu_name() -> str:
    """The processor's name as Linux gives it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
