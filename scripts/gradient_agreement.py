"""How far the local rule's gradient points the way back-propagation through time does, as a Markdown table.

    python scripts/gradient_agreement.py                     # nano, after 60 steps of BPTT on Python's standard library
    python scripts/gradient_agreement.py steps=0 tokens=256

A row is a group of parameters, a column a kind of feedback; an entry is the cosine between the two gradients of one
window of the training text. A few steps come first because a new network's output projections are zero.
"""

import sys

import torch

from neurogen.config.compose import compose_config
from neurogen.data import LaneBatches, build_corpus
from neurogen.errors import UserError
from neurogen.learning import LocalLearningConfig, make_learning_rule
from neurogen.learning.agreement import cosines
from neurogen.learning.config import FEEDBACKS
from neurogen.model import NeuroGen

DEFAULTS = {"steps": 60, "lanes": 8, "tokens": 64, "seed": 0}


def options(arguments: list[str]) -> dict[str, int]:
    """DEFAULTS, replaced by `key=number` arguments. Raises UserError for any other."""
    chosen = dict(DEFAULTS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in chosen or not value.isdigit():
            raise UserError(f"{argument}: give one of {', '.join(DEFAULTS)} as key=number")
        chosen[key] = int(value)
    return chosen


def main(arguments: list[str]) -> int:
    """Print the table; return the exit code."""
    try:
        chosen = options(arguments)
        config = compose_config([f"data.lanes={chosen['lanes']}", f"data.window={chosen['tokens']}"])
        corpus = build_corpus(config.data)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(chosen["seed"])
    model = NeuroGen(config.model, vocab_size=corpus.tokenizer.vocab_size)  # type: ignore[arg-type]
    batches = LaneBatches(corpus.train, lanes=chosen["lanes"], window=chosen["tokens"], seed=chosen["seed"])
    for _ in range(chosen["steps"]):
        batch = next(batches)
        model.train_step(batch.input_ids, batch.target_ids)
    model.double()  # so that what differs is the rule, and not rounding
    batch = next(batches)
    rules = {
        feedback: make_learning_rule(LocalLearningConfig(feedback=feedback), model, seed=chosen["seed"])
        for feedback in FEEDBACKS
    }
    found = {feedback: cosines(rule, model, batch) for feedback, rule in rules.items()}
    print(f"| parameters | {' | '.join(FEEDBACKS)} |\n|---|{'---|' * len(FEEDBACKS)}")
    for group in found[FEEDBACKS[0]]:
        print(f"| {group} | {' | '.join(f'{found[feedback][group]:.3f}' for feedback in FEEDBACKS)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
