"""Leaving on SIGINT (Ctrl-C) and SIGTERM (a scheduler's notice) with everything saved.

The first signal only sets a flag: the trainer ends its step, saves, and leaves with exit code 130 (SIGINT) or 143
(SIGTERM), 128 plus the signal's number as shells report it. The second one leaves at once, with the same code and
without saving. A run whose disk refuses a file may ask for the same end itself (74).
"""

import signal
import threading
from types import FrameType
from typing import Any

ASKED_EXIT_CODE = 74  # EX_IOERR of sysexits.h: only a disk that refuses a file makes a run ask


class StopRequest:
    """Watch for signals inside a `with`; the handlers of before are back afterwards.

    Python delivers signals to the main thread only: in another thread nothing is watched and `requested` stays False.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._asked: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come, or the program has asked for the end itself."""
        return self._signal is not None or self._asked is not None

    @property
    def name(self) -> str | None:
        """ "SIGINT", "SIGTERM", what the program called its own reason, or None."""
        return self._asked if self._signal is None else self._signal.name

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 74 where the program asked, 0 when nothing has."""
        if self._signal is not None:
            return 128 + self._signal
        return 0 if self._asked is None else ASKED_EXIT_CODE

    def ask(self, reason: str) -> None:
        """Ask for the end as a first signal would. `reason` reads well before "received"."""
        self._asked = self._asked or reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
