"""The chat on a real terminal, and through pipes."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

from simulations.chat.chat import Chat
from simulations.chat.terminal import Lines, history_file, visible
from tests.simulations.chat.helpers import dialogue
from tests.simulations.chat.typed import CTRL_C, CTRL_D, ESCAPE, PROMPT, TAB, UP, Typed

PROGRAM = """
import time
from simulations.chat.chat import Chat, greeting, terminal
from tests.simulations.chat.helpers import dialogue

chat, place = dialogue(max_tokens=100), terminal()
chat.speaker.model.register_forward_pre_hook(lambda *_: print("FORWARD") or time.sleep(0.05))
place.note(*greeting(chat))
Chat(chat, place).run()
print("messages:", chat.messages)
"""


def test_on_a_terminal_keys_do_what_the_help_says(project: Path, tmp_path: Path) -> None:
    """Ctrl-C in an answer stops that; arrow, Tab, Esc-Enter and Ctrl-D do what they are for."""
    home = {"GRAFT_HOME": str(tmp_path), "PYTHONPATH": str(project)}
    with Typed(["-c", PROGRAM], home, project) as chat:
        chat.wait_for("tiny: /help shows the commands, Ctrl-D leaves.")
        chat.wait_for("it goes on with the text")
        chat.wait_for(PROMPT)
        chat.type("/max_to" + TAB)
        chat.wait_for("kens")  # only what is new is drawn
        chat.type(" 90\r")
        chat.wait_for("max_tokens: 90")
        chat.wait_for(PROMPT)
        chat.type("one" + ESCAPE + "\r" + "two\r")
        chat.wait_for("FORWARD")
        chat.type("typed meanwhile")
        time.sleep(0.2)
        chat.type(CTRL_C)
        assert "typed" not in chat.wait_for("(stopped)")
        chat.wait_for("typed meanwhile")  # in the next prompt
        chat.type(CTRL_C)
        chat.wait_for(PROMPT)
        chat.type(UP + "!\r")
        chat.wait_for("FORWARD")
        chat.type(CTRL_C)
        chat.wait_for("(stopped)")
        chat.wait_for(PROMPT)
        chat.type(CTRL_C)
        chat.wait_for("Ctrl-C once more leaves")
        chat.wait_for(PROMPT)
        chat.type(CTRL_D)
        chat.wait_for("2 answers")
        said = chat.wait_for("}]")
        assert chat.process.wait(10) == 0
    assert "'one\\ntwo'" in said
    assert "'one\\ntwo!'" in said
    history = tmp_path / "chat-history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+two!" in history.read_text()


@pytest.mark.usefixtures("one_thread")
def test_through_pipes_answers_alone_go_to_the_output() -> None:
    chat, answers, notes = dialogue(max_tokens=4), io.StringIO(), io.StringIO()
    Chat(chat, Lines(io.StringIO("one\n\n/seed 3\ntwo"), answers, notes)).run()
    said = [one["content"] for one in chat.messages if one["role"] == "assistant"]
    assert answers.getvalue() == "".join(f"{text}\n" for text in said)
    assert len(said) == 2
    assert "seed: 3\n" in notes.getvalue()
    assert "2 answers, 8 tokens" in notes.getvalue()


def test_a_model_cannot_command_the_terminal() -> None:
    assert visible("a\x1b[2Jb\x07\r\n\tc\x9b1m\x7f é🧑") == "a␛[2Jb␇␍\n\tc\ufffd1m␡ é🧑"


def test_history_is_kept_in_grafts_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_HOME", "/somewhere")
    assert history_file() == Path("/somewhere/chat-history")
    monkeypatch.delenv("GRAFT_HOME")
    assert history_file() == Path.home() / ".graft" / "chat-history"
