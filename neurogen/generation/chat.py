"""A conversation in a terminal, carried by a brain state of constant size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from kernels.sample import Sampling
from neurogen.brain import BrainState
from neurogen.errors import UserError
from neurogen.generation.prompts import read
from neurogen.generation.text import TextGenerator, TextPiece

HELP = """\
/save FILE    write the conversation's state
/load FILE    go on from a state
/branch NAME  keep the conversation as it is now under a name and go on in a copy; with a name that is kept, go back
/branch       list the branches
/reset        forget everything
/help, /quit"""


class Terminal(Protocol):
    """Lines in, text out."""

    def read_line(self, prompt: str) -> str | None:
        """A line without its end, or None at the end of the input. Raises KeyboardInterrupt on Ctrl-C."""
        ...

    def write(self, text: str) -> None:
        """Show text at once."""
        ...


class StandardTerminal:
    """Standard input and output."""

    def read_line(self, prompt: str) -> str | None:
        try:
            return input(prompt)
        except EOFError:
            return None

    def write(self, text: str) -> None:
        print(text, end="", flush=True)


@dataclass(frozen=True)
class ChatSettings:
    """How turns are written and drawn.

    Arguments:
        template: what the model reads of a message; `{message}` stands for it.
        stop: strings that end a reply.
        max_new_tokens: of a reply. chunk_tokens: between two looks at the terminal.
        sampling, seed: of the draws.
        weights: what matrices are rounded to while tokens are drawn, see `neurogen.generation.generate`.
    """

    template: str = "{message}\n"
    stop: tuple[str, ...] = ("\n\n",)
    max_new_tokens: int = 256
    chunk_tokens: int = 8
    sampling: Sampling = Sampling(temperature=0.8)  # noqa: RUF009, it is frozen
    seed: int = 0
    weights: str | None = None

    def __post_init__(self) -> None:
        if "{message}" not in self.template:
            raise UserError(f"template is {self.template!r}; it must have {{message}} where the message goes")


class Conversation:
    """A brain that has read everything said so far, and nothing else: no transcript is kept or read again."""

    def __init__(self, generator: TextGenerator, settings: ChatSettings) -> None:
        self.generator, self.settings = generator, settings
        self.state: BrainState | None = None
        self.branches: dict[str, BrainState | None] = {}
        self._fresh = generator.model.init_state(1)

    @property
    def num_tokens(self) -> int:
        """Tokens read."""
        return 0 if self.state is None else int(self.state.position[0])

    @property
    def num_bytes(self) -> int:
        """Of the state; the same however much was said."""
        return self._fresh.num_bytes

    def say(self, message: str, terminal: Terminal) -> None:
        """Read a message and write the reply as it comes. Ctrl-C ends the reply where it is, and the brain remembers
        the message and the part of the reply that it had finished."""
        settings = self.settings
        pieces = self.generator.stream(
            settings.template.replace("{message}", message),
            sampling=settings.sampling,
            max_new_tokens=settings.max_new_tokens,
            chunk_tokens=settings.chunk_tokens,
            seed=settings.seed,
            stop=settings.stop,
            state=self.state,
            weights=settings.weights,
        )
        last: TextPiece | None = None
        try:
            for piece in pieces:
                last = piece
                terminal.write(piece.text)
        except KeyboardInterrupt:
            terminal.write(" [interrupted]")
        terminal.write("\n")
        if last is not None:
            self.state = self._read_last(last)

    def _read_last(self, piece: TextPiece) -> BrainState:
        """The state after the reply's last token too, unless that is the id that ended its document."""
        token = piece.ids[-1]
        if self.generator.starts_documents and token == self.generator.tokenizer.document_start_id:
            return piece.state
        model = self.generator.model
        return read(model, torch.tensor([[token]], device=model.device), piece.state)

    def save(self, path: str | Path) -> int:
        """Write the state; returns the file's size in bytes. Raises UserError if it cannot be written."""
        state = self._fresh if self.state is None else self.state
        try:
            state.save(path)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror})") from error
        return Path(path).stat().st_size

    def load(self, path: str | Path) -> None:
        """Go on from a saved state. Raises UserError if there is none or it is of another brain."""
        state = BrainState.load(path)
        state.check_fits(self._fresh)
        state = state.to(self._fresh.position.device)
        self.state = state if int(state.position[0]) else None

    def branch(self, name: str) -> str:
        """Keep the conversation under `name`, or go back to the one kept there; says which."""
        if name in self.branches:
            self.state = self.branches[name]
            return f"back on {name!r}, {self.num_tokens} tokens"
        self.branches[name] = self.state
        return f"kept {name!r} at {self.num_tokens} tokens; /branch {name} returns to it"

    def reset(self) -> None:
        """Forget everything said; branches stay."""
        self.state = None


def run_chat(conversation: Conversation, terminal: Terminal) -> None:
    """Read messages and commands until the input ends or /quit. What a user got wrong is one line, not the end."""
    terminal.write(f"state: {conversation.num_bytes:,} bytes, whatever is said. /help lists the commands.\n")
    while True:
        try:
            line = terminal.read_line("> ")
        except KeyboardInterrupt:
            terminal.write("\n(/quit or Ctrl-D leaves)\n")
            continue
        if line is None:
            terminal.write("\n")
            return
        line = line.strip()
        if line in ("/quit", "/exit"):
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                terminal.write(command(conversation, line) + "\n")
            else:
                conversation.say(line, terminal)
        except UserError as error:
            terminal.write(f"error: {error}\n")


def command(conversation: Conversation, line: str) -> str:
    """Do what a line that begins with `/` asks; returns what to show. Raises UserError for one that is not known."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/save", "/load") and not argument:
        raise UserError(f"{name} needs a file name")
    if name == "/help":
        return HELP
    if name == "/save":
        size = conversation.save(argument)
        return f"saved {conversation.num_tokens} tokens of conversation in {size:,} bytes to {argument}"
    if name == "/load":
        conversation.load(argument)
        return f"loaded {conversation.num_tokens} tokens of conversation from {argument}"
    if name == "/branch":
        if argument:
            return conversation.branch(argument)
        return "branches: " + (", ".join(sorted(conversation.branches)) or "none")
    if name == "/reset":
        conversation.reset()
        return "forgotten"
    raise UserError(f"{name} is no command; /help lists them")
