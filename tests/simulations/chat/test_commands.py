"""Each command does what /help says; what is wrong is refused in words, and the chat goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from simulations.chat.commands import COMMANDS
from simulations.chat.saved import load
from tests.simulations.chat.helpers import chatting, dialogue, said, talk

pytestmark = pytest.mark.usefixtures("one_thread")

WANTED = {
    "help", "stats", "temperature", "top_p", "max_tokens", "seed", "system", "reset", "undo",
    "retry", "save", "quit",
}  # fmt: skip


def test_help_names_every_command_of_the_issue() -> None:
    _, place = talk(dialogue(), "/help")
    shown = [line.split()[0] for line in place.notes]
    assert shown == [f"/{name}" for name in COMMANDS]
    assert set(COMMANDS) >= WANTED


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/temprature 1", "no command /temprature: did you mean /temperature?"),
        ("/tempp", "did you mean /temperature?"),
        ("/qiut", "did you mean /quit?"),
        ("/xyzzy", "no command /xyzzy: /help lists them"),
        ("/temperature hot", "/temperature takes a number of 0 or more, not 'hot'"),
        ("/temperature -1", "temperature=-1.0: must be from 0 to 100"),
        ("/top_p 2", "top_p=2.0: must be above 0 and at most 1"),
        ("/max_tokens 1.5", "/max_tokens takes a whole number of 1 or more, not '1.5'"),
        ("/seed x", "/seed takes a whole number"),
        ("/undo", "nothing has been said yet"),
        ("/retry", "nothing has been said yet"),
        ("/reset now", "/reset takes no value, and 'now' was given"),
        ("/save", "/save takes the name of a file"),
        ("/save /nowhere/chat.json", "No such file"),
    ],
)
def test_what_is_wrong_is_refused_in_words_and_changes_nothing(line: str, words: str) -> None:
    chat = dialogue()
    before = chat.sampling
    done, place = talk(chat, line, "still here")
    assert words in place.errors[0]
    assert len(place.errors) == 1
    assert chat.sampling == before
    assert len(chat.messages) == 2  # the chat went on
    assert done.failed


def test_settings_are_shown_and_changed() -> None:
    chat = dialogue()
    _, place = talk(
        chat, "/temperature 0.5", "/top_p .9", "/max_tokens 3", "/seed 4", "/stop END \\n", "/seed"
    )
    assert place.notes == [
        "temperature: 0.5", "top_p: 0.9", "max_tokens: 3", "seed: 4", "stop: 'END' '\\n'",
        "seed: 4",
    ]  # fmt: skip
    assert (chat.sampling.seed, chat.sampling.stop) == (4, ("END", "\n"))


def test_undo_retry_reset_and_quit() -> None:
    chat = dialogue()
    _, place = talk(chat, "one", "two", "/undo", "/retry", "/quit", "never read")
    assert [text for role, text in said(chat) if role == "user"] == ["one"]
    assert "Taken back, with its answer: two" in place.notes
    assert chat.total.answers == 3
    talk(chat, "/reset")
    assert chat.messages == []


def test_a_message_may_begin_with_a_slash() -> None:
    chat = dialogue()
    talk(chat, "//etc")
    assert said(chat)[0] == ("user", "/etc")


def test_the_system_message_is_set_and_taken_away() -> None:
    chat = dialogue(chatting())
    _, place = talk(chat, "/system Be kind.", "/system", "/system -")
    assert place.notes == ["System message: Be kind."] * 2 + ["No system message."]


def test_a_saved_chat_is_gone_on_with(tmp_path: Path) -> None:
    chat, file = dialogue(chatting(), seed=3, stop=("X",)), tmp_path / "chat.json"
    talk(chat, "/system Be kind.", "one é", f"/save {file}", f"/save {file}")  # twice: its own file
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_text())["stats"]["tokens"] == 6

    other = dialogue(chatting())
    load(other, file)

    assert (other.messages, other.system, other.sampling) == (
        chat.messages, chat.system, chat.sampling,
    )  # fmt: skip
    assert other.told == []
    again, answer = talk(other, "two")[1].text, talk(chat, "two")[1].text
    assert again == answer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("notes of mine", "is no saved chat"),
        ('{"format": "graft-chat", "version": 9}', "has version 9"),
        ('{"format": "graft-chat", "version": 1, "messages": 3, "sampling": {}}', "is damaged"),
        (
            '{"format": "graft-chat", "version": 1, "messages": [], "sampling": {"warmth": 1}}',
            "does not know: ['warmth']",
        ),
        (
            '{"format": "graft-chat", "version": 1, "messages": [], "sampling": {"top_p": 9}}',
            "top_p=9",
        ),
    ],
)
def test_another_file_is_neither_loaded_nor_overwritten(tmp_path: Path, text, words) -> None:
    file = tmp_path / "notes"
    file.write_text(text)
    with pytest.raises(ValueError, match=r".") as refused:
        load(dialogue(), file)
    assert words in str(refused.value)
    if "graft-chat" not in text:
        _, place = talk(dialogue(), f"/save {file}")
        assert "is no saved chat" in place.errors[0]
        assert file.read_text() == text


def test_stats_tell_of_the_last_answer_and_of_all() -> None:
    chat = dialogue()
    _, place = talk(chat, "/stats", "one", "/stats", "two", "/stats")
    assert place.notes[0] == "no tokens yet"
    assert "1 answer, 6 tokens: " in place.notes[2]
    assert "all answers:" in place.notes
    assert "2 answers, 12 tokens: " in place.notes[-2]  # the end tells it again


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    chat, before = dialogue(max_tokens=100), signal.getsignal(signal.SIGINT)
    _, place = talk(chat, "one", "two", on_text=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert place.notes.count("(stopped)") == 2
    assert chat.last.tokens < 100
    assert signal.getsignal(signal.SIGINT) is before  # none, for tests in the background


def test_ctrl_c_at_the_prompt_leaves_the_second_time() -> None:
    chat = dialogue()
    _, place = talk(chat, KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "two")
    assert [text for role, text in said(chat) if role == "user"] == ["one"]
    assert place.notes.count("Ctrl-C once more leaves, as Ctrl-D does.") == 2


def test_an_answer_that_its_length_ended_says_so() -> None:
    _, place = talk(dialogue(max_tokens=3), "one")
    assert "(the first 3 tokens: /max_tokens 6 for more)" in place.notes
