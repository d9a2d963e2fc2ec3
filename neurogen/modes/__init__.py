"""How a sequence runs: five ways through the same model, chosen by name."""

from neurogen.modes.registry import MODES, TOKEN_BY_TOKEN, Mode, check_dropout_runs, make_mode, resolve_mode

__all__ = ["MODES", "TOKEN_BY_TOKEN", "Mode", "check_dropout_runs", "make_mode", "resolve_mode"]
