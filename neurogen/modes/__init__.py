"""How a sequence runs: five ways through the same model, chosen by name."""

from neurogen.modes.registry import MODES, Mode, make_mode, resolve_mode

__all__ = ["MODES", "Mode", "make_mode", "resolve_mode"]
