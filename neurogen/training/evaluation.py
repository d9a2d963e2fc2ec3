"""How well a model predicts text it did not train on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from neurogen.brain.dropout import evaluating
from neurogen.data import Corpus, Tokenizer, TokenStream, validation_batches
from neurogen.data.batches import IGNORE
from neurogen.training.distributed import SINGLE, World
from neurogen.training.precision import Precision

if TYPE_CHECKING:
    from neurogen.models import LanguageModel


@dataclass(frozen=True)
class Evaluation:
    """Totals of one pass over a text.

    Arguments:
        nats: summed cross-entropy; document-start targets (the end of a text) included.
        num_targets, num_correct: targets, and those the arg-max hit.
        num_bytes: bytes of text the targets stand for; a document start stands for none.
    """

    nats: float
    num_targets: int
    num_correct: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats a token."""
        return self.nats / self.num_targets

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes: comparable between tokenizers. nan for a text of no bytes."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss), inf where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of targets that the arg-max hits."""
        return self.num_correct / self.num_targets

    def __add__(self, other: Evaluation) -> Evaluation:
        """The two texts as one."""
        return Evaluation(
            self.nats + other.nats,
            self.num_targets + other.num_targets,
            self.num_correct + other.num_correct,
            self.num_bytes + other.num_bytes,
        )

    def metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>/loss`, `/bpb`, `/perplexity` and `/accuracy`."""
        return {
            f"{prefix}/loss": self.loss,
            f"{prefix}/bpb": self.bits_per_byte,
            f"{prefix}/perplexity": self.perplexity,
            f"{prefix}/accuracy": self.accuracy,
        }


def evaluate_corpus(
    model: LanguageModel, corpus: Corpus, *, max_tokens: int | None = None, **settings: Any
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """The validation text as a whole, and of a mixture each source. `settings` as `evaluate` takes them.

    max_tokens is shared out evenly among the sources: the first tokens of a mixture are all of its first source.
    """
    streams = corpus.validation_sources or {"": corpus.validation}
    share = None if max_tokens is None else max(1, max_tokens // len(streams))
    results = {
        name: evaluate(model, stream, corpus.tokenizer, max_tokens=share, **settings)
        for name, stream in streams.items()
    }
    first, *others = results.values()
    return sum(others, start=first), results if corpus.validation_sources else {}


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    lanes: int,
    window: int,
    precision: Precision,
    max_tokens: int | None = None,
    carry_state: bool = True,
    context: int | None = None,
    world: World = SINGLE,
) -> Evaluation:
    """Read `stream` once in lanes and sum up; the first `max_tokens` targets at most.

    carry_state: hand each lane's state from window to window, as in training; otherwise every window starts from a
    new one, which shows what the memory of earlier windows is worth. context: tokens after which a carried state is
    replaced by a new one, a multiple of the window; None for never. Processes share the lanes out if they divide, and
    otherwise all read everything; each has the whole result. Synchronises once, at the end.
    """
    assert context is None or (carry_state and context % window == 0), (context, window)
    # A short text in many lanes would be mostly padding.
    num_targets = min(len(stream) - 1, max_tokens or len(stream) - 1)
    lanes = max(1, min(lanes, num_targets // (context or window)))
    device = precision.device
    bytes_of = torch.from_numpy(tokenizer.token_num_bytes())
    nats = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    targets = num_bytes = 0
    state = None
    readers = world if lanes % world.size == 0 else SINGLE
    shares = {"rank": readers.rank, "world_size": readers.size}
    batches = validation_batches(stream, lanes=lanes, window=window, max_tokens=max_tokens, **shares)
    with evaluating(model):
        for number, batch in enumerate(batches):
            if not carry_state or (context is not None and number * window % context == 0):
                state = None
            valid = batch.target_ids[batch.target_ids != IGNORE]
            part = batch.to(device)
            with precision.autocast():
                out = model(
                    part.input_ids,
                    state,
                    document_start=part.document_start,
                    target_ids=part.target_ids,
                )
            state = out.state
            nats += out.loss.double() * len(valid)
            correct += out.num_correct
            targets += len(valid)
            num_bytes += int(bytes_of[valid].sum())
    totals = [nats, correct.double(), nats.new_tensor(float(targets)), nats.new_tensor(float(num_bytes))]
    total_nats, hits, num_targets, num_bytes = readers.sum(torch.stack(totals)).tolist()
    return Evaluation(total_nats, int(num_targets), int(hits), int(num_bytes))
