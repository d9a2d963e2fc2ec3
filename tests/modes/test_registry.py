"""Modes by name."""

import pytest

from neurogen import UserError
from neurogen.modes import MODES, make_mode, resolve_mode


def test_every_built_mode_has_its_own_name() -> None:
    for name in ("naive", "pointer", "preallocated", "unfused"):
        assert name in MODES
        assert make_mode(name).name == name


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match="mode is 'fast'; choose one of auto, naive"):
        resolve_mode("fast")
