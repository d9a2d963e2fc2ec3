"""Small durable files: atomic replacement, directory syncing and strict JSON."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neurogen.errors import UserError

MAX_JSON_BYTES = 64 * 2**20
_FLOAT_TAG = "__float__"


def fsync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut (a rename is only durable once its directory is)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and sync it; the caller syncs the directory."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, to be written and synced in the block; then it takes the place of `path`.

    A reader, or a crash at any moment, sees the old content or the new, never a part. When the block or the file
    system fails, `path` is as it was and nothing is left beside it.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path`, as `replacing` does."""
    with replacing(path) as temporary:
        write_durably(temporary, content)


def canonical_json(tree: Any) -> bytes:
    """One spelling for one value: sorted keys, no spaces, ASCII, no NaN. What fingerprints are taken of."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def encode_floats(tree: Any) -> Any:
    """Copy a JSON-able tree with every NaN and infinity replaced by `{"__float__": "nan"}`, which JSON can hold.

    Raises TypeError for a key that is not a string, since JSON would silently turn it into one.
    """
    if isinstance(tree, float) and not math.isfinite(tree):
        return {_FLOAT_TAG: repr(float(tree))}
    if isinstance(tree, dict):
        for key in tree:
            if not isinstance(key, str):
                raise TypeError(f"JSON keys are strings, got {key!r}")
        return {key: encode_floats(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [encode_floats(value) for value in tree]
    return tree


def decode_floats(tree: Any) -> Any:
    """Undo `encode_floats` (tuples come back as lists)."""
    if isinstance(tree, dict):
        if set(tree) == {_FLOAT_TAG} and tree[_FLOAT_TAG] in ("nan", "inf", "-inf"):
            return float(tree[_FLOAT_TAG])
        return {key: decode_floats(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [decode_floats(value) for value in tree]
    return tree


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def parse_json(content: bytes) -> Any:
    """Parse strict JSON: UTF-8, no NaN, no duplicate keys.

    Raises ValueError for anything else, including nesting too deep to parse.
    """
    try:
        return json.loads(
            content.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a JSON object from a file nobody vouches for.

    Raises UserError naming the file, what is wrong and `remedy` when it is missing, over 64 MiB, not strict JSON, or
    no object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, the limit is {MAX_JSON_BYTES}")
        tree = parse_json(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError(f"holds a {type(tree).__name__}, not an object")
        return tree
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {_one_line(error)}; {remedy}") from error


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200]
