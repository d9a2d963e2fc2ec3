"""How far back a model's memory reaches: loss against tokens since reset, and the loss's gradient against time lag.

Shape letters: B lanes, T tokens, D workspace width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from neurogen.data.batches import IGNORE, Batch

if TYPE_CHECKING:
    from neurogen.model import NeuroGen
    from neurogen.models import LanguageModel

MAX_LOGITS = 1 << 25  # numbers held at once
HORIZON_SHARE = 0.95  # of what context is worth


@dataclass(frozen=True)
class AgeBin:
    """Loss of the tokens whose context is `first` to `last` tokens long.

    Arguments:
        first, last: tokens read since the reset, the current one among them; at least 1.
        loss: their mean cross-entropy in nats.
        error: standard error of the mean over lanes; nan for a single lane.
        count: how many tokens they are.
    """

    first: int
    last: int
    loss: float
    error: float
    count: int


def context_lengths(document_start: Tensor) -> Tensor:
    """Tokens read since the reset, the current one among them, of lanes that start new: `[B, T]` bool to int64."""
    at = torch.arange(document_start.shape[1], device=document_start.device).expand_as(document_start)
    starts = torch.where(document_start, at, 0).cummax(dim=1).values
    return at - starts + 1


def octaves(longest: int) -> list[tuple[int, int]]:
    """Ranges 1, 2 to 3, 4 to 7 ... that cover 1 to `longest`; a last one less than half full joins the one before."""
    ranges = [(1 << i, min((2 << i) - 1, longest)) for i in range(max(longest, 0).bit_length())]
    if len(ranges) > 1 and 2 * (longest - ranges[-1][0] + 1) < ranges[-1][0]:
        *ranges, (first, _), _ = ranges
        ranges.append((first, longest))
    return ranges


def loss_by_context(losses: Tensor, lengths: Tensor, counted: Tensor) -> list[AgeBin]:
    """Mean loss of each octave of context lengths that has tokens.

    Arguments:
        losses: `[B, T]` nats.
        lengths: `[B, T]`, see `context_lengths`.
        counted: `[B, T]` bool, which tokens have a target.
    """
    losses, lengths, counted = losses.double().cpu(), lengths.cpu(), counted.cpu()
    bins = []
    for first, last in octaves(int(lengths.max()) if lengths.numel() else 0):
        chosen = counted & (lengths >= first) & (lengths <= last)
        count = int(chosen.sum())
        if not count:
            continue
        total = torch.where(chosen, losses, 0.0).sum(1)
        each = chosen.sum(1)
        lanes = (total / each)[each > 0]
        error = float(lanes.std() / math.sqrt(len(lanes))) if len(lanes) > 1 else math.nan
        bins.append(AgeBin(first, last, float(total.sum()) / count, error, count))
    return bins


def memory_horizon(bins: Sequence[AgeBin], share: float = HORIZON_SHARE) -> int | None:
    """The shortest context that gives `share` of what context is worth, in tokens.

    Context is worth the fall from the first bin's loss to the lowest of all; the answer is the `first` of the first bin
    that has fallen so far. None if nothing falls.
    """
    if not bins or min(each.loss for each in bins) >= bins[0].loss:
        return None
    top, low = bins[0].loss, min(each.loss for each in bins)
    return next(each.first for each in bins if top - each.loss >= share * (top - low))


@torch.no_grad()
def token_losses(model: LanguageModel, batch: Batch) -> Tensor:
    """Cross-entropy in nats of every target, `[B, T]` float32 on the model's device, 0 where there is none.

    Lanes start new. The logits are the definition's, in float32, made for a piece of the tokens at a time and with the
    state carried from piece to piece, so that no more than `MAX_LOGITS` numbers are held; a model that carries nothing
    reads the window whole.
    """
    device = model.device
    part = batch.to(device)
    lanes, num_tokens = part.input_ids.shape
    state = model.init_state(lanes)
    piece = max(1, MAX_LOGITS // (lanes * model.vocab_size)) if state.layers else num_tokens
    losses = []
    for ids, targets, starts in zip(
        part.input_ids.split(piece, 1), part.target_ids.split(piece, 1), part.document_start.split(piece, 1)
    ):
        out = model(ids, state, document_start=starts)
        state = out.state
        logits = out.logits.float().transpose(1, 2)
        losses.append(F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none"))
    return torch.cat(losses, dim=1)


def gradient_by_lag(
    losses_of: Callable[[Tensor], Tensor], x: Tensor, positions: Sequence[int], lengths: Tensor
) -> Tensor:
    """How strongly the loss at a token depends on what was read some tokens before.

        G_l = mean over lanes b and positions t of || d L_{b,t} / d x_{b,t-l} ||_2

    over the pairs with l < lengths[b, t]: a reset lies between the others, and nothing passes it.

    Arguments:
        losses_of: `[B, T, D]` to losses `[B, T]`; a lane's losses depend on that lane alone.
        x: `[B, T, D]`, where the gradient is taken.
        positions: tokens whose loss is followed back, each in [0, T).
        lengths: `[B, T]`, see `context_lengths`.

    Returns:
        `[max(positions) + 1]` float64 on the CPU, nan for a lag that no pair has. One backward pass a position.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        losses = losses_of(x)
    num_lags = max(positions) + 1
    total = torch.zeros(num_lags, dtype=torch.float64)
    count = torch.zeros(num_lags, dtype=torch.float64)
    for number, t in enumerate(positions, start=1):
        (grad,) = torch.autograd.grad(losses[:, t].sum(), x, retain_graph=number < len(positions))
        norms = grad[:, : t + 1].double().norm(dim=-1).flip(1).cpu()  # by lag
        valid = torch.arange(t + 1) < lengths[:, t, None].cpu()
        total[: t + 1] += torch.where(valid, norms, 0.0).sum(0)
        count[: t + 1] += valid.sum(0)
    return torch.where(count > 0, total / count, math.nan)


def workspace_gradient_by_lag(model: NeuroGen, batch: Batch, positions: Sequence[int]) -> Tensor:
    """`gradient_by_lag` of a brain, x being the workspace as the thalamus hands it to the regions.

    Runs the definition of every op in float32 from a new state; positions need targets.
    """
    part = batch.to(model.device)
    state = model.init_state(part.input_ids.shape[0])
    brain = model.brain
    with torch.no_grad():
        x, recent_ids = brain.thalamus(
            part.input_ids, model.embedding.weight, state.recent_ids, part.document_start, "reference"
        )

    def losses_of(workspace: Tensor) -> Tensor:
        out = brain.think(workspace, recent_ids, state, part.document_start)
        logits = model.decoder(out.broca_output).transpose(1, 2)
        return F.cross_entropy(logits, part.target_ids, ignore_index=IGNORE, reduction="none")

    return gradient_by_lag(losses_of, x, positions, context_lengths(part.document_start))
