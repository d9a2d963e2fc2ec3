"""Take a tree of Python containers apart into named tensors and a JSON description, and put it together again, exactly.

Made for `optimizer.state_dict()`: integer keys, tuples, None, booleans, floats that are not finite and 0-d tensors
survive.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from neurogen.errors import UserError


def flatten_tree(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Return (tensors by path, structure). `structure` is JSON-able and names tensors by paths like `state.0.exp_avg`.

    Raises TypeError for a leaf that is no tensor, None, bool, int, float or str, and for a key that is no int or str.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(tree, "", tensors)


def _flatten(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = path or "tensor"
        while name in tensors:  # {1: ..., "1": ...} and keys with dots can spell the same path
            name += "'"
        tensors[name] = node.detach()
        return {"tensor": name}
    if isinstance(node, dict):
        items = []
        for key, value in node.items():
            if isinstance(key, bool) or not isinstance(key, int | str):
                raise TypeError(f"cannot store the key {key!r} at {path!r}: keys are str or int")
            items.append([key, _flatten(value, f"{path}.{key}" if path else str(key), tensors)])
        return {"dict": items}
    if isinstance(node, list | tuple):
        values = [
            _flatten(value, f"{path}.{index}" if path else str(index), tensors) for index, value in enumerate(node)
        ]
        return {"tuple" if isinstance(node, tuple) else "list": values}
    if isinstance(node, float) and not math.isfinite(node):
        return {"float": repr(float(node))}
    if node is None or type(node) in (bool, int, float, str):
        return node
    raise TypeError(
        f"cannot store {type(node).__name__} at {path!r}: leaves are tensors, numbers, strings, booleans or None"
    )


def unflatten_tree(tensors: Mapping[str, Tensor], structure: Any) -> Any:
    """Undo `flatten_tree`. Raises UserError for a structure or a tensor name that it cannot have written."""
    try:
        return _unflatten(tensors, structure)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"the stored structure does not describe its tensors ({error!r}); use another checkpoint"
        ) from error


def _unflatten(tensors: Mapping[str, Tensor], node: Any) -> Any:
    if not isinstance(node, dict):
        if isinstance(node, list):
            raise ValueError("a bare list")
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unflatten(tensors, item) for key, item in value}
    if kind == "list":
        return [_unflatten(tensors, item) for item in value]
    if kind == "tuple":
        return tuple(_unflatten(tensors, item) for item in value)
    if kind == "float" and value in ("nan", "inf", "-inf"):
        return float(value)
    raise ValueError(f"unknown kind {kind!r}")
