"""`resume=<run>`: a run's own configuration, with what this command line says on top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from neurogen.config.schema import GROUPS
from neurogen.training.run_directory import RunDirectory

AUTO = "auto"


def continue_config(tree: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The tree to run for a composed `tree` and the command line it came from.

    Without `resume`, or with resume=auto (the same command given again), that is `tree`. With resume=<run directory
    or checkpoint> it is the run's saved configuration, in which only the keys and groups named on this command line
    are replaced, so that resuming does not mean repeating every override. Raises UserError if there is no such run.
    """
    path = tree.get("resume")
    if path is None or path == AUTO:
        return tree
    folder = Path(str(path))
    folder = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    saved = OmegaConf.create(RunDirectory.view(folder).read_config())
    assert isinstance(saved, DictConfig)
    saved.run_dir = None  # resume says where
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key == "experiment":
            return tree  # a preset names the whole run
        if key in GROUPS or OmegaConf.select(tree, key, default=None) is not None or override.value() is None:
            OmegaConf.update(saved, key, OmegaConf.select(tree, key), merge=False, force_add=True)
    return saved
