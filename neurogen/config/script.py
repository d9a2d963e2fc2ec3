"""The frame every script shares: compose, check, run, and say in one line what a user got wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from neurogen.config.compose import CONF_DIR, CONFIG_ERRORS, build_config, explain, explain_empty_group
from neurogen.config.schema import Config
from neurogen.errors import UserError

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it


def run_script(
    task: Callable[[Any], int | None],
    *,
    config_name: str = "config",
    root: type[Any] = Config,
    verbatim: Sequence[str] = (),
    prepare: Callable[[DictConfig, Sequence[str]], DictConfig] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Compose conf/<config_name>.yaml with the command line, check it as `root` and call `task` with it.

    `verbatim` keys are taken from the command line as they stand (`prompt=def f(x):`), past Hydra's grammar;
    `prepare` may replace the composed tree, given the overrides, before it is checked.
    Returns the exit code: the task's (None is 0), 2 after `error: ...` on stderr for what a user can mend, 130 after a
    Ctrl-C that the task did not take. A bug keeps its traceback.
    """
    interrupts_raise()
    words, texts = _split_verbatim(list(sys.argv[1:] if arguments is None else arguments), verbatim)
    outcome: list[int | UserError] = []

    def guarded(node: DictConfig) -> None:
        # Hydra prints a line of its own about a job that raises, so a user's error leaves by this list instead.
        try:
            OmegaConf.set_struct(node, False)
            node.update(dict.fromkeys(texts, ""))
            if prepare is not None:
                node = prepare(node, list(HydraConfig.get().overrides.task))
            outcome.append(task(build_config(node, root, verbatim=texts)) or 0)
        except UserError as error:
            outcome.append(error)

    saved_argv, saved_flag = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [sys.argv[0], *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed over several lines
    try:
        hydra.main(config_path=str(CONF_DIR), config_name=config_name, version_base="1.3")(guarded)()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except CONFIG_ERRORS as error:
        outcome.append(UserError(explain(error, root)))
    except ValueError as error:
        outcome.append(UserError(explain_empty_group(error, words)))
    finally:
        sys.argv = saved_argv
        if saved_flag is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_flag
    errors = [result for result in outcome if isinstance(result, UserError)]
    rank = os.environ.get("RANK", "0")
    for each in errors:
        head = "error" if rank == "0" else f"error on rank {rank}"
        print(f"{head}: {' '.join(str(each).split())}", file=sys.stderr)
    if errors:
        return USER_ERROR_EXIT_CODE
    return max((result for result in outcome if isinstance(result, int)), default=0)


def interrupts_raise() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, where a script had it end the process while it was importing."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _split_verbatim(words: list[str], verbatim: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `key=text` words of the verbatim keys out of a command line."""
    texts: dict[str, str] = {}
    rest: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        if equals and key in verbatim:
            texts[key] = text
        else:
            rest.append(word)
    return rest, texts
