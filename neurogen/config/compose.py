"""From YAML files and overrides to one checked config object.

Hydra composes, OmegaConf checks types, checks.py checks values. Whatever a user can get wrong comes out as a
UserError of one line that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
    ValidationError,
)

from neurogen.config.checks import check_config
from neurogen.config.schema import DEFAULT_NAMES, GROUPS, Config
from neurogen.errors import UserError

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
CONFIG_ERRORS = (HydraException, MissingConfigException, OmegaConfBaseException)

C = TypeVar("C")


def compose_config(overrides: Sequence[str] = ()) -> Config:
    """Compose conf/config.yaml with `overrides` as scripts/train.py does, without running anything.

    Raises UserError, one line naming the key, for an unknown key or choice, a wrong type or an impossible combination.
    """
    return build_config(compose_node(overrides), Config)


def compose_node(overrides: Sequence[str] = (), *, config_name: str = "config") -> DictConfig:
    """The composed but unchecked tree (see compose_config)."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose(config_name, overrides=list(overrides))
    except CONFIG_ERRORS as error:
        raise UserError(explain(error)) from error
    except ValueError as error:
        raise UserError(explain_empty_group(error, overrides)) from error


def build_config(
    tree: DictConfig | Mapping[str, Any], root: type[C], *, verbatim: Mapping[str, str] | None = None
) -> C:
    """Check a composed tree (or a plain mapping read from a file) and make it a `root` dataclass.

    `verbatim` replaces root keys by texts in which nothing is interpolated.
    Nothing named in the tree is ever imported or called: it can hold numbers, text, lists and nothing else.
    """
    try:
        node = OmegaConf.create(dict(tree)) if not isinstance(tree, DictConfig) else tree
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        assert isinstance(values, dict)
        config = _build_fields({str(key): value for key, value in values.items()} | dict(verbatim or {}), root)
    except CONFIG_ERRORS as error:
        raise UserError(explain(error, root)) from error
    if isinstance(config, Config):
        check_config(config)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """The config as plain numbers, text and lists, ready for YAML or JSON; build_config reads it back."""
    return dataclasses.asdict(config)


def _build_fields(values: dict[str, Any], root: type[C]) -> C:
    names = [field.name for field in dataclasses.fields(root)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise UserError(_unknown_key(key, root))
    hints = typing.get_type_hints(root)
    groups = [name for name in names if name in GROUPS and hints[name] is not str]  # a script may take a plain `mode`
    built: dict[str, Any] = {name: _build_group(name, values[name]) for name in groups if values.get(name)}
    plain = [field for field in dataclasses.fields(root) if field.name not in groups]  # type: ignore[arg-type]
    spec = [(field.name, hints[field.name], _default_of(field)) for field in plain]
    schema = OmegaConf.structured(dataclasses.make_dataclass("Root", spec))
    given = {field.name: values[field.name] for field in plain if field.name in values}
    built.update(OmegaConf.to_container(OmegaConf.merge(schema, given), throw_on_missing=True))  # type: ignore[arg-type]
    try:
        return root(**built)
    except TypeError as error:
        missing = next((name for name in names if name not in built), None)
        raise UserError(f"{missing}: missing from the config; its default is in conf/config.yaml") from error


def _checkable(hint: Any) -> Any:
    """A type OmegaConf can check, or Any: it knows no unions with lists, which their dataclass checks itself."""
    return Any if any(typing.get_origin(part) in (list, dict) for part in typing.get_args(hint)) else hint


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return "???"


def _build_group(group: str, values: Any) -> Any:
    """One group's dataclass; a group with several schemas is told apart by its `name`."""
    if not isinstance(values, Mapping):
        raise UserError(f"{group}={values}: names a group; choose one of {', '.join(group_choices(group))}")
    schema = _schema_of(group, values)
    hints = typing.get_type_hints(schema)
    # OmegaConf makes a frozen dataclass read-only before it is filled, hence a plain copy of its fields.
    fields = [field for field in dataclasses.fields(schema) if field.init]
    spec = [(field.name, _checkable(hints[field.name]), _default_of(field)) for field in fields]
    plain = dataclasses.make_dataclass(schema.__name__, spec)
    checked = OmegaConf.merge(OmegaConf.create({group: OmegaConf.structured(plain)}), {group: dict(values)})
    built = OmegaConf.to_container(checked, throw_on_missing=True)
    assert isinstance(built, dict)
    try:
        return schema(**built[group])
    except UserError as error:
        message = str(error)
        if message.startswith(f"{group}."):
            raise
        raise UserError(f"{group}.{message}") from error


def _schema_of(group: str, values: Mapping[str, Any]) -> Any:
    schema = GROUPS[group]
    if not isinstance(schema, dict):
        return schema
    name = values.get("name", DEFAULT_NAMES.get(group))
    if name not in schema:
        raise UserError(f"{group}.name={name}: unknown; choose one of {', '.join(schema)}")
    return schema[name]


def group_choices(group: str) -> list[str]:
    """The names of the YAML files in conf/<group>, those that others only build on (`_...`) left out."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("[!_]*.yaml"))


def explain(error: Exception, root: type[Any] = Config) -> str:
    """One line for a Hydra or OmegaConf error: the key, what is wrong with it, what to do."""
    if isinstance(error, MissingConfigException):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        if group:
            return f"{group}={choice}: no such choice; choose one of {', '.join(group_choices(group))}"
    if isinstance(error, OverrideParseException):
        reason = next(iter(str(error).splitlines()), "cannot be read")
        return f"{error.override}: not a key=value that can be read ({reason}); quote the value: 'key=\"value\"'"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None) or ""
    unknown = re.search(r"Could not (?:override|delete from config\.|append to config\.) *'?([\w.@/]+)'", str(error))
    if unknown and "already" not in str(error):
        return _unknown_key(unknown.group(1), root)
    if isinstance(cause, MissingMandatoryValue):
        name = re.search(r"[Mm]issing mandatory value: *([\w.]+)", str(cause))
        key = key or (name.group(1) if name else "")
        return f"{key}: missing; give {key}=VALUE"
    first = str(cause).splitlines()[0].rstrip(".") if str(cause) else type(cause).__name__
    if isinstance(cause, ConfigKeyError) and key:
        return _unknown_key(key, root)
    if isinstance(cause, (ValidationError, InterpolationKeyError, UnsupportedInterpolationType)) and key:
        return f"{key}: {first[:1].lower()}{first[1:]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("See http")]
    return (f"{key}: " if key and key not in lines[0] else "") + "; ".join(lines)


def explain_empty_group(error: ValueError, overrides: Sequence[str]) -> str:
    """One line for the bare ValueError that Hydra raises when a group is set to null. Any other ValueError is raised
    again."""
    if "Config group override" not in str(error):
        raise error
    for group in GROUPS:
        if any(word.strip() in (f"{group}=null", f"{group}=") for word in overrides):
            return f"{group}=null: a run needs one; choose one of {', '.join(group_choices(group))}"
    return " ".join(str(error).split())


def _unknown_key(key: str, root: type[Any]) -> str:
    """Name an unknown key and the nearest known one."""
    group, _, leaf = key.rpartition(".")
    known: list[str] = []
    if not group:
        known = [field.name for field in dataclasses.fields(root)] + (["experiment"] if root is Config else [])
    elif group in GROUPS:
        schemas = GROUPS[group] if isinstance(GROUPS[group], dict) else {"": GROUPS[group]}
        known = sorted({field.name for schema in schemas.values() for field in dataclasses.fields(schema)})
        if leaf in known and not isinstance(GROUPS[group], dict):
            return f"{key}: no {group} is chosen; choose one first: {group}={' or '.join(group_choices(group))}"
        if leaf in known:
            owners = [name for name, schema in schemas.items() if leaf in {f.name for f in dataclasses.fields(schema)}]
            return f"{key}: the chosen {group} has no such key; it belongs to {group}={' or '.join(owners)}"
    near = difflib.get_close_matches(leaf, known, n=1)
    if near:
        return f"{key}: unknown key; did you mean {group + '.' if group else ''}{near[0]}?"
    return f"{key}: unknown key" + (f"; known here: {', '.join(known)}" if known else "")
