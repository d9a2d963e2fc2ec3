"""From settings to an ordered list of files."""

from __future__ import annotations

import glob
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from neurogen.data.config import DataConfig
from neurogen.errors import UserError

# The standard library's own tests are left out: they are a third of it, distributions ship them or not as they please,
# and some are deliberately not valid UTF-8. What is installed beside the library is not part of it.
STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class SourceFile:
    """One input file. `name` is how the split knows it: it does not depend on where the file lies on this machine."""

    path: Path
    name: str

    @property
    def is_jsonl(self) -> bool:
        return self.path.name.endswith((".jsonl", ".jsonl.zst"))


def find_sources(config: DataConfig) -> list[SourceFile]:
    """The files of `config` in a fixed order: entries as given, the files of one entry sorted by name.

    Raises UserError for a path that does not exist, a glob or directory without files, and a file named twice.
    """
    if config.kind == "stdlib":
        return stdlib_sources()
    sources: list[SourceFile] = []
    for entry in config.paths:
        sources.extend(_expand(entry))
    seen: set[Path] = set()
    for source in sources:
        resolved = source.path.resolve()
        if resolved in seen:
            raise UserError(f"data.path names {source.path} twice; give each file once")
        seen.add(resolved)
    return sources


def stdlib_sources(root: Path | None = None) -> list[SourceFile]:
    """The .py files of the standard library under `root` (default: of the running Python), sorted by relative path."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    sources = []
    for path in _walk(root, excluded=STDLIB_EXCLUDED):
        if path.suffix == ".py":
            sources.append(SourceFile(path, path.relative_to(root).as_posix()))
    if not sources:
        raise UserError(f"this Python has no .py files of its standard library in {root}; use data=text")
    return sorted(sources, key=lambda source: source.name)


def _expand(entry: str) -> list[SourceFile]:
    path = Path(entry).expanduser()
    if path.is_file():
        return [SourceFile(path, path.name)]
    if path.is_dir():
        found = sorted(_walk(path, excluded=frozenset({"__pycache__"})))
        if not found:
            raise UserError(f"data.path {entry} is a directory without files")
        return [SourceFile(file, file.relative_to(path).as_posix()) for file in found]
    if glob.has_magic(entry):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise UserError(f"data.path {entry} matches no file")
        return [SourceFile(file, file.name) for file in files]
    raise UserError(f"data.path {entry} does not exist")


def _walk(root: Path, *, excluded: frozenset[str]) -> list[Path]:
    files: list[Path] = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in excluded and not name.startswith(".")]
        files.extend(Path(directory) / name for name in names if not name.startswith("."))
    return [file for file in files if file.is_file()]
