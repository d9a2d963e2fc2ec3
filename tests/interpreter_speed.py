"""Triton's interpreter without a third of its work, which is to make ready what is ready."""

import inspect
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Leave `triton.language` alone in a kernel's calls of other functions if the launch has already put the
    interpreter's functions there: to look through all its members anew takes a millisecond, thousands of times a test.
    """
    patch = interpreter._patch_lang

    def patch_what_is_not(fn: Any) -> Any:
        languages = [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]
        members = [member for each in languages for member in (each.load, each.tensor.__add__)]
        if not members or any(map(tl.core.is_builtin, members)):
            return patch(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_what_is_not
