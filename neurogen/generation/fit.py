"""What a brain and a mode can be asked for: one launch, and 8-bit weights in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.generate.limits import check_quantized, check_shape
from neurogen.errors import UserError
from neurogen.generation.packing import brain_shape

if TYPE_CHECKING:
    from neurogen.model import NeuroGen

WEIGHTS = ("int8",)  # what matrices can be rounded to for a reply


def fits_launch(model: NeuroGen, weights: str | None = None) -> str | None:
    """None if the launch can run this brain, for one lane if matrices are rounded, otherwise why not, in one line."""
    if model.config.token_shift:
        return f"it has no model.token_shift, which is {model.config.token_shift} here"
    shape = brain_shape(model.config, model.vocab_size)
    try:
        if weights is None:
            check_shape(shape, 1)
        else:
            check_quantized(shape, 1, model.device)
    except ValueError as error:
        return str(error)
    return None


def check_weights(model: NeuroGen, weights: str | None, num_lanes: int) -> None:
    """Raise UserError, one line, unless the model's mode can draw tokens for so many lanes with matrices rounded to
    `weights`: `int8`, for one lane in one launch. None, matrices as they are, always goes."""
    if weights is None:
        return
    if weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}; choose {' or '.join(WEIGHTS)}, or leave it out")
    if model.mode.name != "fused":
        raise UserError(f"weights={weights}: is for mode=fused, not {model.mode.name}; change the mode or leave it out")
    if num_lanes != 1:
        raise UserError(f"weights={weights}: is for 1 lane, not {num_lanes}; ask for one reply or leave it out")
    reason = fits_launch(model, weights)
    if reason is not None:
        raise UserError(f"weights={weights}: needs one launch: {reason}; leave it out")
