"""Evaluate a checkpoint on a validation text and print one JSON object.

    python scripts/evaluate.py checkpoint=runs/20260101-120000-ab12               # on the data it was trained with
    python scripts/evaluate.py checkpoint=runs/... data=text data.path=book.txt max_tokens=100000
    python scripts/evaluate.py checkpoint=runs/... 'contexts=[512,8192]'
    python scripts/evaluate.py checkpoint=runs/... weights=int8                  # or fp8: also with rounded weights

loss is in nats a token, bpb in bits a byte of text; `reset_...` gives every window a new state, so the gap to the
values without it is what memory across windows is worth. `context_N_bpb` reads on for N tokens, window by window,
and then starts from a new state. `int8_...` and `fp8_...` are of matrices rounded to 8 bits, row by row. A GPT sees
its window alone, so it has `contexts` of that length and no other. A text that has no more validation tokens than
one window of the training had is refused.
"""

import json
import signal
import sys
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a traceback

from neurogen.config.script import run_script
from neurogen.config.script_configs import EvaluateConfig
from neurogen.data import build_corpus
from neurogen.errors import UserError
from neurogen.model import NeuroGen
from neurogen.training.evaluation import evaluate_corpus
from neurogen.training.rounding import round_weights
from neurogen.training.trained import load_trained


def main(config: EvaluateConfig) -> None:
    trained = load_trained(config.checkpoint, mode=config.mode, device=config.device, dtype=config.dtype)
    if config.weights is not None and not isinstance(trained.model, NeuroGen):
        raise UserError(f"weights={config.weights}: only a brain's matrices are rounded; leave it out here")
    data = config.data or trained.config.data
    asked, kind, size = data.tokenizer, trained.tokenizer.kind, trained.tokenizer.vocab_size
    if asked in ("bytes", "bpe") and (asked != kind or data.vocab_size not in (None, size)):
        remedy = f"data.tokenizer={kind}" + (f" data.vocab_size={size}" if kind == "bpe" else "")
        raise UserError(f"data.tokenizer={asked}: the checkpoint's vocabulary is {kind} with {size} ids; use {remedy}")
    check_contexts(config.contexts, data.window, carries_state=bool(trained.model.init_state(1).layers))
    corpus = build_corpus(data, tokenizer=trained.tokenizer if config.data else None)
    if corpus.tokenizer.fingerprint != trained.tokenizer.fingerprint:
        raise UserError(
            f"data: its text has changed and gives another vocabulary than {trained.path}; name a text with data=text"
        )
    window = trained.config.data.window
    if len(corpus.validation) <= window:
        raise UserError(
            f"data: its validation part has {len(corpus.validation)} tokens, no more than one window of {window} that "
            "the checkpoint was trained with; give more text, or raise data.validation_fraction"
        )
    if corpus.left_out:
        print(corpus.left_out, file=sys.stderr)
    results: dict[str, object] = {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "mode": trained.model.mode.name,
    }
    settings: dict[str, Any] = {
        "lanes": data.lanes,
        "window": data.window,
        "precision": trained.precision,
        "max_tokens": config.max_tokens,
    }
    for prefix, carry_state in (("", True), ("reset_", False)):
        result, sources = evaluate_corpus(trained.model, corpus, carry_state=carry_state, **settings)
        results |= {f"{prefix}{key.removeprefix('val/')}": value for key, value in result.metrics("val").items()}
        results |= {f"{prefix}bpb/{name}": source.bits_per_byte for name, source in sources.items()}
    results |= {"num_tokens": result.num_targets, "num_bytes": result.num_bytes}
    for context in config.contexts:
        result, _ = evaluate_corpus(trained.model, corpus, context=context, **settings)
        results[f"context_{context}_bpb"] = result.bits_per_byte
    if config.weights is not None:  # last: it changes the model
        results[f"{config.weights}_num_weights"] = round_weights(trained.model, config.weights)
        result, _ = evaluate_corpus(trained.model, corpus, carry_state=True, **settings)
        values = result.metrics("val").items()
        results |= {f"{config.weights}_{key.removeprefix('val/')}": value for key, value in values}
    print(json.dumps(results))


def check_contexts(contexts: list[int], window: int, *, carries_state: bool) -> None:
    """Raise UserError for a context that windows do not make up, or that a model which carries nothing cannot have."""
    for context in contexts:
        if context % window:
            raise UserError(f"contexts={context}: not a multiple of data.window={window}; change one of the two")
        if context != window and not carries_state:
            raise UserError(
                f"contexts={context}: this model carries nothing past its window; leave it out, or set "
                f"data.window={context} to have it read so far in one piece"
            )


if __name__ == "__main__":
    sys.exit(run_script(main, config_name="evaluate", root=EvaluateConfig, verbatim=("checkpoint",)))
