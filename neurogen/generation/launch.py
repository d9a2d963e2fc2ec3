"""A reply in one launch: the prompt by the mode's whole-sequence kernels, then all tokens by `kernels.generate`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from kernels.generate import generate
from neurogen.errors import UserError
from neurogen.generation.fit import fits_launch
from neurogen.generation.loop import PolledReader, token_loop
from neurogen.generation.packing import pack_state, packed_brain, unpack_state
from neurogen.generation.prompts import GROUP_LANES, read
from neurogen.generation.request import Generation, Request

if TYPE_CHECKING:
    from neurogen.model import NeuroGen


@torch.no_grad()
def generate_in_one_launch(model: NeuroGen, request: Request, *, backend: str = "fused") -> Generation:
    """Continue the request's prompts, at most 64 lanes; see `neurogen.generation.generate`.

    The number of launches does not depend on the number of tokens, and nothing waits for the device. Matrices are read
    in the type of torch.autocast where it is on, otherwise in the model's, or with the request's `weights` in int8. All
    of the prompt but its last token is read by the training kernels, from the weights as they are.
    """
    device = model.device
    assert request.input_ids.shape[0] <= GROUP_LANES
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else None
    state = read(model, request.input_ids[:, :-1], request.state)
    out = generate(
        packed_brain(model, dtype, request.weights),
        pack_state(model, state),
        request.input_ids[:, -1],
        request.sampling,
        max_new_tokens=request.max_new_tokens,
        seed=request.seed,
        lanes=request.lane_numbers(),
        stop_ids=torch.tensor(request.stop, dtype=torch.int64).to(device, non_blocking=True),
        seen=request.seen_tokens(model.vocab_size),
        backend=backend,
    )
    return Generation(out.tokens, out.log_probs, out.lengths, unpack_state(out.state, state))


def launch_or_loop(model: NeuroGen, request: Request) -> Generation:
    """`generate_in_one_launch` where brain and device allow it, otherwise the token loop, with a warning that says why:
    a device that cannot hold the launch's programs at once refuses it, it does not hang.

    With the request's `weights`, which the loop knows nothing of, that is a UserError.
    """
    reason = fits_launch(model, request.weights)
    if reason is None:
        try:
            return generate_in_one_launch(model, request)
        except RuntimeError as error:
            if not _too_small(error):
                raise
            reason = str(error)
    if request.weights is not None:
        raise UserError(f"weights={request.weights}: needs one launch: {reason}; leave it out")
    warnings.warn(f"generating token by token instead of in one launch: {reason}", stacklevel=2)
    return token_loop(model, request, PolledReader(request, model.device))


def _too_small(error: RuntimeError) -> bool:
    """Whether a launch failed for want of shared memory, registers or room for all its programs."""
    return type(error).__name__ == "OutOfResources" or "cooperative launch" in str(error)
