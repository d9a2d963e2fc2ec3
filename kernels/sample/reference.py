"""Drawing the next token from logits, in plain torch."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.sample.philox import exponential, philox


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Applied in the order of the fields, as the transformers library does.

    Arguments:
        repetition_penalty: > 0; logits of tokens seen before are divided by it where positive, multiplied where not
            (Keskar et al. 2019). 1 leaves them.
        temperature: >= 0; logits are divided by it. 0 takes the most likely token, whatever the filters.
        top_k: >= 0; only the k most likely tokens stay. 0 keeps all.
        top_p: in (0, 1]; only the smallest set of most likely tokens that holds this much probability stays.
        min_p: in [0, 1]; only tokens at least this fraction as likely as the likeliest stay.

    Tokens exactly as likely as the last one kept stay too, so that the outcome does not depend on a sorting order.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        _check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0")
        _check(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or above")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (off) or above")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")


def _check(holds: bool, name: str, value: float, limit: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {limit}")


class SampleOutput(NamedTuple):
    """Tokens `[B]` int64 and their log-probabilities `[B]` float32 under the unmodified softmax of the logits."""

    tokens: Tensor
    log_probs: Tensor


def processed_logits(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits after penalty, temperature and filters; what was filtered out is -inf.

    Arguments:
        logits: `[B, V]`.
        sampling: temperature must not be 0.
        seen: `[B, V]` bool, the tokens a repetition penalty applies to; needed if it is not 1.

    Returns:
        `[B, V]` float32; its softmax is the distribution that is drawn from.
    """
    logits = _penalized(logits.float(), sampling, seen) / sampling.temperature
    num_ids = logits.shape[-1]
    if 0 < sampling.top_k < num_ids:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if sampling.top_p < 1:
        ranked = logits.sort(dim=-1, descending=True).values
        probs = ranked.softmax(-1)
        mass_before = probs.cumsum(-1) - probs
        # The likeliest token has nothing before it and so always stays.
        in_nucleus = mass_before < sampling.top_p
        threshold = ranked.gather(-1, in_nucleus.sum(-1, keepdim=True) - 1)
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if sampling.min_p > 0:
        threshold = logits.amax(-1, keepdim=True) + torch.log(torch.tensor(sampling.min_p))
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    return logits


def _penalized(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    if sampling.repetition_penalty == 1:
        return logits
    assert seen is not None, "a repetition penalty needs the tokens seen so far"
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_logits(
    logits: Tensor,
    sampling: Sampling,
    *,
    seed: int,
    lanes: Tensor,
    positions: Tensor,
    seen: Tensor | None = None,
) -> SampleOutput:
    """Draw one token a lane by an exponential race: arg-max of logit - log(e), e standard exponential (Gumbel-max).

    The draw e of token id i is a pure function of (seed, lane, position, i), so that the same seed gives the same
    tokens however the sequence is run.

    Arguments:
        logits: `[B, V]`.
        sampling: how to draw.
        seed: any integer, taken modulo 2^64.
        lanes: `[B]` int64, the number of each lane.
        positions: `[B]` int64, the position of the token to draw in its lane.
        seen: `[B, V]` bool, for the repetition penalty.
    """
    raw = logits.float()
    if sampling.temperature == 0:
        scores = _penalized(raw, sampling, seen)
    else:
        ids = torch.arange(raw.shape[-1], device=raw.device)
        draws = exponential(philox(seed, ids[None], positions[:, None], lanes[:, None]))
        scores = processed_logits(raw, sampling, seen) - draws.log()
    tokens = scores.argmax(-1)
    log_probs = raw.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return SampleOutput(tokens, log_probs)


def sample_reference(
    hidden: Tensor,
    weight: Tensor,
    sampling: Sampling,
    *,
    seed: int,
    lanes: Tensor,
    positions: Tensor,
    seen: Tensor | None = None,
) -> SampleOutput:
    """Logits W h of one position a lane and a token drawn from them; hidden `[B, D]`, weight `[V, D]`; the rest as for
    `sample_logits`."""
    logits = F.linear(hidden, weight.to(hidden.dtype))
    return sample_logits(logits, sampling, seed=seed, lanes=lanes, positions=positions, seen=seen)
