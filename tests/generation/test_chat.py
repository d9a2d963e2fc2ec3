"""The chat, driven by a terminal of strings."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import brains
import pytest
import torch

from kernels.sample import Sampling
from neurogen import BrainState
from neurogen.data import ByteTokenizer
from neurogen.generation.chat import ChatSettings, Conversation, run_chat
from neurogen.generation.text import TextGenerator


class FakeTerminal:
    """Plays the given lines and keeps what is written; a line may be an exception to raise."""

    def __init__(self, *lines: str | BaseException, on_write: Callable[[str], None] | None = None) -> None:
        self.lines, self.output, self.on_write = list(lines), "", on_write

    def read_line(self, prompt: str) -> str | None:
        if not self.lines:
            return None
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text: str) -> None:
        self.output += text
        if self.on_write is not None:
            self.on_write(text)


def conversation(**settings: object) -> Conversation:
    model = brains.small_brain(vocab_size=257)
    defaults: dict[str, object] = {"max_new_tokens": 12, "chunk_tokens": 4, "sampling": Sampling(temperature=0.9)}
    return Conversation(
        TextGenerator(model, ByteTokenizer()),
        ChatSettings(**{**defaults, **settings}),  # type: ignore[arg-type]
    )


def play(talk: Conversation, *lines: str | BaseException) -> str:
    terminal = FakeTerminal(*lines)
    run_chat(talk, terminal)
    return terminal.output


def assert_same_state(a: BrainState | None, b: BrainState | None) -> None:
    assert a is not None
    assert b is not None
    for name, x in b.tensors().items():
        torch.testing.assert_close(a.tensors()[name], x, rtol=1e-5, atol=1e-6)


def test_the_brain_reads_all_that_was_said_once() -> None:
    talk = conversation(stop=())
    read: list[int] = []

    class Recording(TextGenerator):
        def stream(self, prompt, **arguments):
            read.extend(self.encode(prompt, new=arguments["state"] is None).tolist())
            for piece in super().stream(prompt, **arguments):
                yield piece
            read.extend(piece.ids)

    talk.generator = Recording(talk.generator.model, talk.generator.tokenizer)
    play(talk, "hello", "and then?")
    assert read.count(256) == 1, "a reply that ends its document would not be read to its end"
    with torch.no_grad():
        expected = talk.generator.model.forward(torch.tensor([read]))
    assert talk.num_tokens == len(read)
    assert_same_state(talk.state, expected.state)


def test_the_state_stays_as_large_as_it_is_and_is_shown(tmp_path: Path) -> None:
    talk = conversation()
    first, second = tmp_path / "first", tmp_path / "second"
    output = play(talk, "a", f"/save {first}", "a much longer message than the first one", "b", f"/save {second}")
    assert first.stat().st_size == second.stat().st_size
    assert f"{talk.num_bytes:,} bytes" in output
    assert f"in {first.stat().st_size:,} bytes" in output


def test_a_loaded_conversation_goes_on_alike(tmp_path: Path) -> None:
    one, other = conversation(), conversation()
    file = tmp_path / "state"
    play(one, "hello there", f"/save {file}")
    assert play(other, f"/load {file}", "and now?").splitlines()[2:] == play(one, "and now?").splitlines()[1:]
    assert_same_state(one.state, other.state)


def test_branches_part_and_meet() -> None:
    talk = conversation()
    play(talk, "hello", "/branch fork", "one way")
    one_way = talk.state
    output = play(talk, "/branch fork", "another way")
    assert "back on 'fork'" in output
    assert not torch.equal(talk.state.recent_ids, one_way.recent_ids) or talk.num_tokens != int(one_way.position)
    play(talk, "/branch fork", "one way")
    assert_same_state(talk.state, one_way)
    assert "branches: fork" in play(talk, "/branch")


def test_reset_forgets() -> None:
    talk = conversation()
    fresh = play(talk, "hello")
    output = play(talk, "/reset", "hello")
    assert "forgotten" in output
    assert fresh.splitlines()[1:] == output.splitlines()[2:]


def test_ctrl_c_ends_the_reply_and_not_the_session() -> None:
    talk = conversation(max_new_tokens=400, stop=())
    writes = 0

    def interrupt(text: str) -> None:
        nonlocal writes
        writes += 1
        if writes == 4:
            raise KeyboardInterrupt

    terminal = FakeTerminal("hello", "/help", on_write=interrupt)
    run_chat(talk, terminal)
    assert "[interrupted]" in terminal.output
    assert "/branch NAME" in terminal.output, "the session went on"
    assert 0 < talk.num_tokens <= 1 + len("hello\n") + 3 * 4, "the message, and what had come of the reply"


def test_ctrl_c_at_the_prompt_says_how_to_leave() -> None:
    assert "/quit" in play(conversation(), KeyboardInterrupt(), "/quit", "never read").splitlines()[2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/load nowhere", "no brain state file at nowhere"),
        ("/save", "/save needs a file name"),
        ("/save no/such/folder/state", "cannot write no/such/folder/state (No such file or directory)"),
        ("/dance", "/dance is no command"),
    ],
)
def test_what_goes_wrong_is_one_line_and_the_session_goes_on(line: str, words: str) -> None:
    output = play(conversation(), line, "/help")
    assert f"error: {words}" in output
    assert "/quit" in output


def test_a_state_of_another_brain_is_refused(tmp_path: Path) -> None:
    brains.small_brain(embedding_dim=64).init_state(1).save(tmp_path / "other")
    talk = conversation()
    assert "error: the state's" in play(talk, f"/load {tmp_path / 'other'}")
    assert talk.state is None


def test_the_script_names_a_missing_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[2] / "scripts" / "chat.py"
    monkeypatch.setattr(sys, "argv", [str(script), f"checkpoint={tmp_path / 'none'}"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(script), run_name="__main__")
    assert leaving.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
