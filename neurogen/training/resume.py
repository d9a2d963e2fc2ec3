"""Which run to continue, from which checkpoint, and what a changed configuration means for it."""

from pathlib import Path
from typing import Any

from neurogen.errors import UserError
from neurogen.training.checkpoint import Checkpoint, find_usable, load_checkpoint
from neurogen.training.run_directory import RunDirectory, config_fingerprint

ABSENT = "<absent>"


def prepare_run(
    *, run_dir: str | None, resume: str | None, config: dict[str, Any], root: str | Path = "runs"
) -> tuple[RunDirectory, Checkpoint | None]:
    """Return the locked directory of a run and the checkpoint to go on from (None: from the start).

    Arguments:
        run_dir: where the run is kept; None for a fresh name below `root`.
        resume: None for a new run; a run directory, or one checkpoint in it, to continue; "auto" to continue
            `run_dir` if it is there, or without one the newest run below `root` with the same configuration that has
            not finished and is not live, and to start afresh if there is none.
        config: the resolved configuration, which is written to a new run and compared with an old one's.

    Raises UserError for a path that is in use, no run, live, or damaged. The configurations are not compared here:
    `config_difference` shows what changed, and the caller knows what may.
    """
    if resume is None:
        return RunDirectory.create(run_dir, config=config, root=root), None
    if resume != "auto":
        return _continue(Path(resume), run_dir)
    if run_dir is not None:
        if (Path(run_dir) / "config.yaml").is_file():
            return _continue(Path(run_dir), run_dir)
        return RunDirectory.create(run_dir, config=config), None
    unfinished = find_unfinished(Path(root), config_fingerprint(config))
    if unfinished is None:
        return RunDirectory.create(config=config, root=root), None
    return _continue(unfinished, None)


def _continue(path: Path, run_dir: str | None) -> tuple[RunDirectory, Checkpoint | None]:
    is_checkpoint = path.parent.name == "checkpoints"
    folder = path.parent.parent if is_checkpoint else path
    if run_dir is not None and Path(run_dir).resolve() != folder.resolve():
        raise UserError(f"resume={path} continues in {folder}, but run_dir={run_dir}; leave run_dir out")
    run = RunDirectory.open(folder)
    try:
        if is_checkpoint:
            return run, load_checkpoint(path)
        latest = find_usable(run.checkpoints)
        return run, None if latest is None else load_checkpoint(latest)
    except BaseException:
        run.close()
        raise


def find_unfinished(root: Path, fingerprint: str) -> Path | None:
    """Return the newest run below `root` with this configuration that neither finished nor is live, or None."""
    candidates = sorted(root.iterdir(), reverse=True) if root.is_dir() else []
    for path in candidates:
        if not (path / "config.yaml").is_file() or not (path / "status.json").is_file():
            continue
        run = RunDirectory.view(path)
        try:
            matches = (
                config_fingerprint(run.read_config()) == fingerprint and run.read_status().get("state") != "finished"
            )
        except UserError:
            continue  # a damaged run is not the one to continue unasked; naming it in resume= says what is wrong
        if matches and not run.is_live:
            return path
    return None


def config_difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (old value, new value)} where two configurations differ; a missing side is "<absent>"."""
    left, right = _dotted(old), _dotted(new)
    return {
        key: (left.get(key, ABSENT), right.get(key, ABSENT))
        for key in sorted(left.keys() | right.keys())
        if left.get(key, ABSENT) != right.get(key, ABSENT)
    }


def _dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
