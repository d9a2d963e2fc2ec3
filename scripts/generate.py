"""Continue a prompt with a trained model.

    python scripts/generate.py checkpoint=runs/20260101-120000-ab12 prompt="def main("
    python scripts/generate.py checkpoint=runs/... prompt="import " temperature=0 max_new_tokens=64 'stop=["def "]'
    python scripts/generate.py checkpoint=runs/... prompt_file=notes.txt num_samples=4 format=jsonl > samples.jsonl
    echo -n "import " | python scripts/generate.py checkpoint=runs/... prompt_file=-

A line feed in a stop string is written as a shell writes one: $'stop=["\\n\\n"]'. Everything after `prompt=` is the
prompt, whatever it holds; prompt_file is read as it stands, its last line feed too. Prints the prompt and what follows
it, or one JSON object a sample; tokens/s, the reading of the prompt and a first launch's compiling among them, go to
stderr.
"""

import json
import signal
import sys
import time

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a traceback

from neurogen.config.script import run_script
from neurogen.config.script_configs import GenerateConfig
from neurogen.generation.request import make_sampling
from neurogen.generation.text import TextGenerator
from neurogen.training.trained import load_trained


def main(config: GenerateConfig) -> None:
    prompt = config.read_prompt()
    sampling = make_sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
    )
    trained = load_trained(config.checkpoint, mode=config.mode, device=config.device, dtype=config.dtype)
    generator = TextGenerator(trained.brain(), trained.tokenizer, trained.starts_documents)
    start = time.perf_counter()
    with trained.precision.autocast():
        replies = generator.complete(
            [prompt],
            sampling=sampling,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            num_samples=config.num_samples,
            stop=config.stop,
            weights=config.weights,
        )
    seconds = time.perf_counter() - start
    num_tokens = sum(reply.num_tokens for reply in replies)
    for reply in replies:
        if config.format == "jsonl":
            row = {
                "prompt": reply.prompt,
                "sample": reply.sample,
                "text": reply.text,
                "tokens": reply.ids,
                "num_tokens": reply.num_tokens,
                "log_prob_mean": reply.log_prob / reply.num_tokens,
                "ended": reply.ended,
                "seed": config.seed,
                "tokens_per_second": num_tokens / seconds,
            }
            print(json.dumps(row))
        else:
            if config.num_samples > 1:
                print(f"--- sample {reply.sample}")
            print(reply.prompt + reply.text)
    lanes = "" if config.num_samples == 1 else f" in {config.num_samples} lanes"
    print(f"{num_tokens} tokens{lanes} in {seconds:.2f} s: {num_tokens / seconds:,.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    verbatim = ("checkpoint", "prompt", "prompt_file")
    sys.exit(run_script(main, config_name="generate", root=GenerateConfig, verbatim=verbatim))
