"""Outputs of consecutive pieces of a sequence as the output of the whole."""

from collections.abc import Sequence

import torch

from neurogen.brain import BrainOutput
from neurogen.brain.regions import Activity


def join_outputs(pieces: Sequence[BrainOutput]) -> BrainOutput:
    """One output for at least one consecutive piece."""
    activity = {}
    for name in pieces[0].activity:
        parts = [piece.activity[name] for piece in pieces]
        activity[name] = Activity(
            torch.stack([part.num_fired for part in parts]).sum(0, dtype=torch.int32),
            torch.stack([part.num_saturated for part in parts]).sum(0, dtype=torch.int32),
            sum(part.num_tokens for part in parts),
        )
    gates = [piece.go for piece in pieces if piece.go is not None]
    return BrainOutput(
        broca_output=torch.cat([piece.broca_output for piece in pieces], dim=1),
        state=pieces[-1].state,
        activity=activity,
        go=torch.cat(gates, dim=1) if gates else None,
    )
