"""What asking, trying again, taking back and editing make of a chat."""

from __future__ import annotations

import pytest

from simulations.ui import turns

CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "2"},
]


def test_what_the_browser_shows_is_read_whatever_form_it_has() -> None:
    shown = [
        {"role": "user", "content": [{"type": "text", "text": "one"}], "metadata": None},
        {"role": "assistant", "content": "1", "options": None},
    ]

    assert turns.read(shown) == CHAT[:2]
    assert turns.read(None) == []


def test_again_takes_the_last_answer_away_and_nothing_else() -> None:
    assert turns.again(CHAT) == CHAT[:3]
    assert turns.again(CHAT[:3]) == CHAT[:3]
    with pytest.raises(ValueError, match="write something first"):
        turns.again([])


def test_undo_takes_question_and_answer_away_and_gives_the_question_back() -> None:
    assert turns.undone(CHAT) == (CHAT[:2], "two")
    assert turns.undone(CHAT[:3]) == (CHAT[:2], "two")


def test_an_edited_question_cuts_away_what_follows_and_is_answered() -> None:
    assert turns.edited(CHAT, 0, "uno") == ([{"role": "user", "content": "uno"}], True)


def test_an_edited_answer_cuts_away_what_follows_and_stands() -> None:
    left, ask = turns.edited(CHAT, 1, "I")

    assert left == [CHAT[0], {"role": "assistant", "content": "I"}]
    assert not ask


@pytest.mark.parametrize(("place", "text"), [(4, "three"), (-1, "x"), (0, "  ")])
def test_what_cannot_be_edited_is_refused_in_words(place: int, text: str) -> None:
    with pytest.raises(ValueError, match="load the page again|empty message"):
        turns.edited(CHAT, place, text)


def test_a_system_prompt_comes_first_if_there_is_one() -> None:
    assert turns.prompt(CHAT, " ") == CHAT
    assert turns.prompt(CHAT, "be brief ")[0] == {"role": "system", "content": "be brief"}
