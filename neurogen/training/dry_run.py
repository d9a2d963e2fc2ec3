"""A step before the first one: does it fit into memory, and if not, in how many parts would it?"""

from __future__ import annotations

from collections.abc import Callable

import torch

from neurogen.errors import UserError


def check_memory(attempt: Callable[[int], None], *, lanes: int, accumulation: int, window: int, search: bool) -> None:
    """Try a step and raise UserError, with what fits instead, if it runs out of memory.

    Arguments:
        attempt: takes a whole step in so many parts and leaves everything as it was; raises torch.OutOfMemoryError.
        lanes, accumulation, window: of the configuration; `lanes` those of this process.
        search: whether other numbers of parts may be tried; if not, one is guessed.
    """
    try:
        attempt(accumulation)
        return
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        cause = error.with_traceback(None)  # the frames hold the tensors that filled the memory
    problem = f"data.lanes={lanes}: a step of {accumulation} part(s) does not fit into memory ({reason})"
    if not search:
        raise UserError(f"{problem}; try trainer.accumulation={2 * accumulation}, or lower data.lanes") from cause
    for parts in (number for number in range(accumulation + 1, lanes + 1) if lanes % number == 0):
        if _fits(attempt, parts):
            raise UserError(f"{problem}; trainer.accumulation={parts} fits, or lower data.lanes") from cause
    raise UserError(f"{problem}, nor does a single lane of data.window={window}; lower data.window") from cause


def _fits(attempt: Callable[[int], None], parts: int) -> bool:
    try:
        attempt(parts)
    except torch.OutOfMemoryError:
        return False
    return True
