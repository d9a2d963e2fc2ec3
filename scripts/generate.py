"""Continue a prompt with a trained model.

    python scripts/generate.py checkpoint=runs/20260101-120000-ab12 prompt="def main("
    python scripts/generate.py checkpoint=runs/... prompt="import " temperature=0 max_new_tokens=64 format=json

Everything after `prompt=` is the prompt, whatever it holds. Prints the prompt and what follows it, or one JSON object.
"""

import json
import sys

from neurogen.config.script import run_script
from neurogen.config.script_configs import GenerateConfig
from neurogen.training.samples import encode_prompt
from neurogen.training.trained import load_trained


def main(config: GenerateConfig) -> None:
    trained = load_trained(config.checkpoint, mode=config.mode, device=config.device, dtype=config.dtype)
    tokenizer = trained.tokenizer
    with trained.precision.autocast():
        reply = trained.model.generate(
            encode_prompt(tokenizer, config.prompt, starts_documents=trained.starts_documents),
            max_new_tokens=config.max_new_tokens,
            do_sample=config.temperature > 0,
            temperature=config.temperature or 1.0,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            seed=config.seed,
            stop=[tokenizer.document_start_id] if trained.starts_documents else [],
        )
    length = int(reply.lengths[0])
    text = tokenizer.decode(reply.tokens[0, :length].tolist())
    if config.format == "text":
        print(config.prompt + text)
        return
    log_prob = float(reply.log_probs[0, :length].sum())
    print(json.dumps({"prompt": config.prompt, "text": text, "num_tokens": length, "log_prob": log_prob}))


if __name__ == "__main__":
    sys.exit(run_script(main, config_name="generate", root=GenerateConfig, verbatim=("checkpoint", "prompt")))
