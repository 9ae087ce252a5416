"""A chat holds what was said, goes back, and is as before after a failure."""

from __future__ import annotations

import threading

import pytest

from simulations.chat.dialogue import Dialogue, sampling_of
from strategies.errors import TrunkError
from tests.simulations.chat.helpers import chatting, dialogue, said
from tests.simulations.talk.helpers import speaker, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def _ask(chat: Dialogue, text: str) -> str:
    return "".join(piece.text for piece in chat.ask(text))


def test_questions_and_answers_come_in_turn_and_figures_add_up() -> None:
    chat = dialogue()
    first, second = _ask(chat, "one"), _ask(chat, "two")
    assert said(chat) == [
        ("user", "one"), ("assistant", first), ("user", "two"), ("assistant", second),
    ]  # fmt: skip
    assert (chat.last.tokens, chat.total.tokens, chat.total.answers) == (6, 12, 2)
    assert chat.last.reused > 0


def test_undone_and_asked_again_a_question_has_the_same_answer() -> None:
    chat = dialogue(chatting(), max_tokens=12)
    answers = [_ask(chat, "one"), _ask(chat, "two")]
    assert chat.undo() == "two"
    assert _ask(chat, "something else") != ""
    chat.undo()
    assert [_ask(chat, "two")] == answers[1:]
    assert "".join(piece.text for piece in chat.retry()) == answers[1]
    assert len(chat.messages) == 4


def test_a_failed_answer_leaves_the_chat_as_it_was() -> None:
    chat = dialogue()
    _ask(chat, "one")
    before = said(chat)

    def fail(*_) -> None:
        raise TrunkError("the trunk is gone")

    handle = chat.speaker.model.register_forward_pre_hook(fail)
    with pytest.raises(TrunkError):
        _ask(chat, "two")
    assert said(chat) == before
    with pytest.raises(TrunkError):
        list(chat.retry())
    assert said(chat) == before
    handle.remove()
    _ask(chat, "two")
    assert len(chat.messages) == 4


def test_a_stopped_answer_is_kept_as_far_as_it_came() -> None:
    chat, cancelled = dialogue(max_tokens=100), threading.Event()
    text = ""
    for piece in chat.ask("one", cancelled):
        text += piece.text
        cancelled.set()
    assert chat.finish == "cancelled"
    assert said(chat) == [("user", "one"), ("assistant", text)]


def test_what_no_longer_fits_is_left_out_from_the_front_and_that_is_told() -> None:
    chat = dialogue(chatting(context=200), max_tokens=10)
    chat.instruct("Be kind.")
    for turn in range(5):
        _ask(chat, f"question {turn}")
    assert len(chat.messages) == 10
    assert "takes 200 tokens: the first" in chat.told[0]
    prompt = chat.speaker.tokenizer.decode(chat._prompt())
    assert "Be kind." in prompt
    assert "question 0" not in prompt
    with pytest.raises(ValueError, match="and the model takes 200"):
        _ask(chat, "x" * 300)
    assert len(chat.messages) == 10


def test_a_system_message_that_the_template_refuses_is_not_taken() -> None:
    talker = chatting()
    talker.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}hi"
    )
    chat = dialogue(talker)
    with pytest.raises(ValueError, match="refuses a conversation of system, user: no system"):
        chat.instruct("Be kind.")
    assert chat.system == ""


def test_settings_are_the_models_own_or_plain_ones() -> None:
    model = tiny()
    assert sampling_of(speaker(model)).temperature == 0.7
    model.generation_config.temperature = 0.3
    assert sampling_of(speaker(model)).temperature == 0.3
