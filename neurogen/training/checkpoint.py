"""Checkpoints: folders that are either whole or not there.

    checkpoints/step-00000100/
        model.safetensors  optimizer.safetensors  state.safetensors   tensors
        tokenizer/...                                                 what the tokenizer saves of itself
        checkpoint.json                                               step, metadata, versions, sizes and hashes

Everything is written to a folder with a temporary name and synced file by file, checkpoint.json last; then the folder
is renamed and its parent synced. A kill at any moment leaves the older checkpoints as they were. Nothing is ever
unpickled.
"""

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from torch import Tensor

from neurogen.errors import UserError
from neurogen.storage.files import (
    MAX_JSON_BYTES,
    canonical_json,
    decode_floats,
    encode_floats,
    fsync_directory,
    read_json,
    write_durably,
)
from neurogen.storage.tensor_file import FileRecord, TensorFile, write_tensors

METADATA_NAME = "checkpoint.json"
_FORMAT = "neurogen-checkpoint"
_FORMAT_VERSION = 1
_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors", "state.safetensors")
_FOLDER = re.compile(r"step-(\d{8,})(\.replaced)?")
_TEMPORARY = ".tmp-"
_log = logging.getLogger(__name__)
_REMEDY = "the checkpoint is damaged or unfinished, use another one"


class CheckpointNotSaved(OSError):
    """The disk refused a checkpoint. What was written of it is gone again, the older checkpoints are as they were."""

    @property
    def reason(self) -> str:
        """Which checkpoint and why, without errno and path."""
        return str(self.strerror)


class SavesItself(Protocol):
    """What a checkpoint needs of a tokenizer."""

    def save(self, directory: Path) -> Any: ...


def _no_fault(stage: str) -> None:
    """Stand in for `reached`, which the crash tests replace to kill the process at a named stage."""


reached: Callable[[str], None] = _no_fault


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    model_tensors: Mapping[str, Tensor],
    optimizer_tensors: Mapping[str, Tensor] | None = None,
    optimizer_scalars: Any = None,
    state_tensors: Mapping[str, Tensor] | None = None,
    metadata: dict[str, Any] | None = None,
    tokenizer: SavesItself | None = None,
    score: float | None = None,
    keep_last: int | None = 3,
    keep_best: bool = True,
) -> Path:
    """Write `directory/step-<step>` durably, then delete what retention does not keep; return the folder.

    Arguments:
        optimizer_scalars: a JSON-able tree, made by `flatten_tree`.
        metadata: a JSON-able tree with string keys (tokens, config, data position, RNG); NaN and infinities are kept.
        score: the lower the better (validation loss); NaN and None never count as best.
        keep_last: how many of the newest checkpoints stay (at least 1); None keeps all.
        keep_best: keep the one with the lowest score too.

    A checkpoint of the same step is replaced, and stays loadable until the new one is in its place.
    Raises CheckpointNotSaved on any error of the file system while writing, TypeError for metadata JSON cannot hold,
    and OSError when the new checkpoint is in place but an old one cannot be deleted.
    """
    if step < 0 or (keep_last is not None and keep_last < 1):
        raise ValueError(f"step is at least 0 and keep_last at least 1, got step={step}, keep_last={keep_last}")
    final = directory / f"step-{step:08d}"
    temporary = directory / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    document = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "step": step,
        "score": encode_floats(score),
        "metadata": encode_floats(metadata or {}),
        "optimizer_scalars": encode_floats(optimizer_scalars),
        "versions": _versions(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        temporary.mkdir()
        reached("begun")
        files: dict[str, FileRecord] = {}
        for name, tensors in zip(_TENSOR_FILES, (model_tensors, optimizer_tensors, state_tensors), strict=True):
            files[name] = write_tensors(temporary / name, tensors or {})
            reached(name)
        if tokenizer is not None:
            files |= _write_tokenizer(temporary, tokenizer)
            reached("tokenizer")
        document["files"] = {name: asdict(record) for name, record in files.items()}
        write_durably(temporary / METADATA_NAME, _seal(document))
        reached("metadata")
        fsync_directory(temporary)
        reached("synced")
        _publish(temporary, final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror or str(error)
        raise CheckpointNotSaved(
            error.errno or errno.EIO, f"checkpoint of step {step} not saved: {reason}", str(directory)
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _apply_retention(directory, newest=step, keep_last=keep_last, keep_best=keep_best)
    return final


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("neurogen", "torch", "numpy", "safetensors", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _write_tokenizer(folder: Path, tokenizer: SavesItself) -> dict[str, FileRecord]:
    """Let the tokenizer save itself below `folder`, sync what it wrote and return its records by relative name."""
    root = folder / "tokenizer"
    root.mkdir()
    tokenizer.save(root)
    records = {}
    for path in sorted(root.rglob("*")):
        if path.is_dir():
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        records[path.relative_to(folder).as_posix()] = FileRecord(path.stat().st_size, _hash_file(path))
    for path in [*(path for path in root.rglob("*") if path.is_dir()), root]:
        fsync_directory(path)
    return records


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _seal(document: dict[str, Any]) -> bytes:
    """Wrap the metadata with its own hash, so that a flipped bit in it is seen like one in a tensor."""
    sealed = {"sha256": hashlib.sha256(canonical_json(document)).hexdigest(), "checkpoint": document}
    content = json.dumps(sealed, indent=1, allow_nan=False).encode("ascii")
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"checkpoint metadata has {len(content)} bytes, the limit is {MAX_JSON_BYTES}")
    return content


def _publish(temporary: Path, final: Path) -> None:
    """Give the finished folder its name. An older one of that name steps aside, and is found there until then."""
    aside = final.with_name(final.name + ".replaced")
    if final.exists():
        _delete(aside)
        os.rename(final, aside)
        reached("set aside")
    os.rename(temporary, final)
    reached("renamed")
    fsync_directory(final.parent)
    reached("published")
    _delete(aside)


def _delete(folder: Path) -> None:
    """Delete a checkpoint: it loses its name first, so that it is never seen half deleted."""
    if folder.exists():
        doomed = folder.with_name(f"{_TEMPORARY}delete-{folder.name}-{time.time_ns()}")
        os.rename(folder, doomed)
        reached("doomed")
        # A network file system keeps a file that another process has open: what is left goes with the next save's
        # sweep.
        shutil.rmtree(doomed, ignore_errors=True)


def _remove_leftovers(directory: Path) -> None:
    """Delete what killed saves left behind. The run's lock sees to it that no other process is writing here."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob("step-*.replaced"):
        replacement = path.with_suffix("")
        if replacement in list_checkpoints(directory):
            _delete(path)


def _apply_retention(directory: Path, *, newest: int, keep_last: int | None, keep_best: bool) -> None:
    reached("retention")
    if keep_last is None:
        return
    folders = list_checkpoints(directory)
    keep = {path.name for path in folders[-keep_last:]} | {f"step-{newest:08d}"}
    if keep_best:
        scores = {path.name: _read_metadata(path)["score"] for path in folders}
        ranked = [(score, name) for name, score in scores.items() if score is not None and score == score]
        if ranked:
            keep.add(min(ranked)[1])
    for path in folders:
        if path.name not in keep:
            _delete(path)


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first: metadata sound, every file there at its size."""
    found: dict[int, Path] = {}
    # A replaced folder sorts after the one that replaced it, and counts only if that one is not whole.
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        match = _FOLDER.fullmatch(path.name)
        if match and int(match[1]) not in found and _is_complete(path, int(match[1])):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def find_latest(directory: Path) -> Path | None:
    """Return the newest complete checkpoint in a folder, or None."""
    checkpoints = list_checkpoints(directory)
    return checkpoints[-1] if checkpoints else None


def find_usable(directory: Path) -> Path | None:
    """Return the newest complete checkpoint in a folder, with a logged warning for each newer one that is damaged.

    Returns None where none was ever saved, and the newest damaged one where all are: loading that says what is wrong.
    A killed save leaves no folder of this name, so one that is not whole was damaged later.
    """
    folders = {int(path.name[5:]): path for path in directory.glob("step-*") if path.name[5:].isdigit()}
    latest = find_latest(directory)
    if latest is None:
        return folders[max(folders)] if folders else None
    for step in sorted(folders):
        if step > int(latest.name[5:].removesuffix(".replaced")):
            _log.warning("warning: %s is damaged; going by %s instead", folders[step], latest)
    return latest


def _is_complete(path: Path, step: int) -> bool:
    try:
        document = _read_metadata(path)
        _check_files(path, document["files"], verify_hashes=False)
    except UserError:
        return False
    return document["step"] == step


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. Tensors are read from disk when asked for; `.load(device)` of a mapping reads it whole."""

    path: Path
    step: int
    score: float | None
    metadata: dict[str, Any]
    versions: dict[str, str]
    model_tensors: TensorFile
    optimizer_tensors: TensorFile
    optimizer_scalars: Any
    state_tensors: TensorFile
    tokenizer_dir: Path | None


def load_checkpoint(path: str | Path, *, verify_hashes: bool = True) -> Checkpoint:
    """Open a checkpoint: its own folder, or the newest complete one of a `checkpoints` folder or of a run directory.

    Raises UserError, in one line naming the file and what to do, when there is none or when anything about it is wrong:
    missing, truncated or (with verify_hashes, which reads every file once) altered files, names that lead out of the
    folder, links, metadata that is not ours.
    """
    folder = _resolve(Path(path))
    document = _read_metadata(folder)
    _check_files(folder, document["files"], verify_hashes=verify_hashes)
    model, optimizer, state = (TensorFile(folder / name, document["files"][name]["tied"]) for name in _TENSOR_FILES)
    has_tokenizer = any(name.startswith("tokenizer/") for name in document["files"])
    return Checkpoint(
        path=folder,
        step=document["step"],
        score=document["score"],
        metadata=document["metadata"],
        versions=document["versions"],
        model_tensors=model,
        optimizer_tensors=optimizer,
        optimizer_scalars=document["optimizer_scalars"],
        state_tensors=state,
        tokenizer_dir=folder / "tokenizer" if has_tokenizer else None,
    )


def _resolve(path: Path) -> Path:
    if not path.is_dir():
        what = "is a file, a checkpoint is a folder" if path.exists() else "does not exist"
        raise UserError(f"checkpoint {path} {what}; give a run directory or a checkpoints/step-... folder")
    if (path / METADATA_NAME).exists() or _FOLDER.fullmatch(path.name):
        return path
    inner = path / "checkpoints"
    latest = find_usable(inner if inner.is_dir() else path)
    if latest is None:
        raise UserError(f"{path} holds no complete checkpoint; give a run directory or a checkpoints/step-... folder")
    return latest


def _read_metadata(folder: Path) -> dict[str, Any]:
    """Read and check checkpoint.json; every value has the type its use expects when this returns."""
    path = folder / METADATA_NAME
    sealed = read_json(path, remedy=_REMEDY)

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise UserError(f"{path} {problem}; {_REMEDY}")

    document = sealed.get("checkpoint")
    require(isinstance(document, dict), "is not checkpoint metadata")
    assert isinstance(document, dict)
    require(document.get("format") == _FORMAT, "is not checkpoint metadata")
    version = document.get("format_version")
    require(version == _FORMAT_VERSION, f"has format version {version!r}, this program reads {_FORMAT_VERSION}")
    try:
        digest = hashlib.sha256(canonical_json(document)).hexdigest()
        document = decode_floats(document)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not checkpoint metadata; {_REMEDY}") from error
    require(sealed.get("sha256") == digest, "does not match its own hash")
    step, score, files = document.get("step"), document.get("score"), document.get("files")
    require(type(step) is int and step >= 0, "has no valid step")
    require(score is None or type(score) in (int, float), "has no valid score")
    require(isinstance(document.get("metadata"), dict), "has no metadata")
    require(isinstance(document.get("versions"), dict), "has no versions")
    require("optimizer_scalars" in document, "has no optimizer_scalars")
    require(isinstance(files, dict) and set(_TENSOR_FILES) <= set(files), "does not list its tensor files")
    assert isinstance(files, dict)
    for name, record in files.items():
        sound = (
            isinstance(record, dict)
            and type(record.get("num_bytes")) is int
            and isinstance(record.get("sha256"), str)
            and isinstance(record.get("tied"), dict)
            and all(isinstance(owner, str) for owner in record["tied"].values())
        )
        require(sound, f"has no valid record of {name!r}")
        require(_is_inside(name), f"names a file outside the checkpoint: {name!r}")
    return document


def _is_inside(name: str) -> bool:
    """Whether a file name from metadata is plain and relative, so that joining it cannot leave the folder."""
    pure = PurePosixPath(name)
    return (
        bool(pure.parts)
        and str(pure) == name
        and not pure.is_absolute()
        and ".." not in pure.parts
        and "\\" not in name
        and name.isprintable()
    )


def _check_files(folder: Path, files: dict[str, dict[str, Any]], *, verify_hashes: bool) -> None:
    for name, record in files.items():
        path = folder
        for part in PurePosixPath(name).parts:
            path = path / part
            if path.is_symlink():
                raise UserError(f"{path} is a link, checkpoints hold plain files only; copy the checkpoint anew")
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is not a plain file; {_REMEDY}")
            if status.st_size != record["num_bytes"]:
                raise UserError(f"{path} has {status.st_size} bytes, {record['num_bytes']} were written; {_REMEDY}")
            if verify_hashes and _hash_file(path) != record["sha256"]:
                raise UserError(f"{path} is not what was written (its hash differs); {_REMEDY}")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from error
