"""Talk with a trained model in a terminal.

    python scripts/chat.py checkpoint=runs/20260101-120000-ab12
    python scripts/chat.py checkpoint=runs/... temperature=0.6 top_p=0.9 load=monday.state

The conversation is the brain's state: it stays as large as it is however long you talk, /save and /load move it through
a file, /branch keeps a copy to return to. Ctrl-C ends a reply, Ctrl-D or /quit the session.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a traceback

from neurogen.config.chat_config import ChatConfig
from neurogen.config.script import run_script
from neurogen.generation.chat import ChatSettings, Conversation, StandardTerminal, run_chat
from neurogen.generation.fit import check_weights
from neurogen.generation.request import make_sampling
from neurogen.generation.text import TextGenerator
from neurogen.training.trained import load_trained


def main(config: ChatConfig) -> None:
    trained = load_trained(config.checkpoint, mode=config.mode, device=config.device, dtype=config.dtype)
    settings = ChatSettings(
        template=config.template,
        stop=tuple(config.stop),
        max_new_tokens=config.max_new_tokens,
        chunk_tokens=config.chunk_tokens,
        sampling=make_sampling(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
        ),
        seed=config.seed,
        weights=config.weights,
    )
    model = trained.brain()
    check_weights(model, config.weights, 1)
    generator = TextGenerator(model, trained.tokenizer, trained.starts_documents)
    conversation = Conversation(generator, settings)
    if config.load is not None:
        conversation.load(config.load)
    with trained.precision.autocast():
        run_chat(conversation, StandardTerminal())


if __name__ == "__main__":
    sys.exit(run_script(main, config_name="chat", root=ChatConfig, verbatim=("checkpoint", "load", "template")))
