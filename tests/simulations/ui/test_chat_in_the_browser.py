"""The chat in a real browser: what is typed, streamed, stopped, tried again, edited, taken back."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulations.ui.conftest import Served, wait

ANSWERS, QUESTIONS = "#chat .bot.message", "#chat .user.message"


def _ask(tab: Any, text: str) -> None:
    tab.fill("#box textarea", text)
    tab.keyboard.press("Enter")


def _answered(tab: Any) -> str:
    """The last answer, once it is whole."""
    tab.wait_for_selector("#figures [data-going=false] small:has-text('last answer')")
    return str(tab.locator(ANSWERS).last.inner_text())


def test_an_answer_grows_before_the_eyes(tab: Any, served: Served) -> None:
    served.speaker.most = 30
    _ask(tab, "Hello")

    tab.wait_for_selector(f"{ANSWERS}:has-text('so it goes')")
    early = tab.locator(ANSWERS).last.inner_text()
    going = tab.locator("#figures [data-going=true]").count()
    whole = _answered(tab)

    assert early.startswith("1: so it goes")
    assert going == 1
    assert len(early) < len(whole) == len("1: ") + 30 * len(served.speaker.words) - 1
    assert served.speaker.asked == [[{"role": "user", "content": "Hello"}]]
    told = tab.locator("#figures").inner_text()
    assert "1,066 up, 1,058 down" in told
    assert "2 sessions, 1.5 MiB" in told
    assert "network" in told


def test_stop_keeps_what_is_there_and_retry_begins_anew(tab: Any, served: Served) -> None:
    served.speaker.most = 400
    _ask(tab, "Hello")
    tab.wait_for_selector(f"{ANSWERS}:has-text('so it goes')")

    tab.click("#stop")
    tab.wait_for_selector("#notice:has-text('Stopped')")
    stopped = tab.locator(ANSWERS).last.inner_text()
    served.speaker.most = 2
    tab.click("#retry")
    tab.wait_for_selector(f"{ANSWERS}:has-text('2: so')")

    assert len(stopped) < 400 * len(served.speaker.words)
    assert _answered(tab).startswith("2: so it goes")
    assert served.speaker.asked[1] == served.speaker.asked[0]
    assert tab.locator(QUESTIONS).count() == tab.locator(ANSWERS).count() == 1
    assert tab.locator("#send").is_visible()
    assert not tab.locator("#stop").is_visible()


def test_an_edit_cuts_away_what_follows_and_undo_gives_the_question_back(
    tab: Any, served: Served
) -> None:
    served.speaker.most = 2
    for count, text in enumerate(("first", "second"), start=1):
        _ask(tab, text)
        tab.wait_for_selector(f"{ANSWERS}:has-text('{count}: so')")
        _answered(tab)

    tab.locator("#chat button[title=Edit]").first.click()
    tab.fill("#chat textarea", "another first")
    tab.locator("#chat button[title=Submit]").click()
    tab.wait_for_selector(f"{ANSWERS}:has-text('3: so')")
    _answered(tab)
    after = tab.locator(f"{QUESTIONS}, {ANSWERS}").all_inner_texts()
    tab.click("#undo")
    tab.wait_for_function("document.querySelector('#box textarea').value === 'another first'")

    assert [text[:13].strip() for text in after] == ["another first", "3: so it goes"]
    assert served.speaker.asked[2] == [{"role": "user", "content": "another first"}]
    assert tab.locator(ANSWERS).count() == 0


@pytest.mark.slow
def test_an_edited_answer_is_what_the_next_question_follows(tab: Any, served: Served) -> None:
    served.speaker.most = 2
    _ask(tab, "first")
    _answered(tab)

    tab.locator("#chat button[title=Edit]").last.click()
    tab.fill("#chat textarea", "no, this")
    tab.locator("#chat button[title=Submit]").click()
    tab.wait_for_selector("#notice:has-text('in place of the answer')")
    _ask(tab, "and then?")
    tab.wait_for_selector(f"{ANSWERS}:has-text('2: so')")

    assert [one["content"] for one in served.speaker.asked[1]] == ["first", "no, this", "and then?"]


@pytest.mark.slow
def test_shift_enter_begins_a_line_and_settings_reach_the_model(tab: Any, served: Served) -> None:
    tab.fill("#box textarea", "one")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("two")
    tab.fill("#max-tokens input[type=number]", "3")
    tab.fill("#temperature input[type=number]", "0.5")
    tab.fill("#seed textarea, #seed input", "7")
    tab.fill("#system textarea", "be brief")
    tab.focus("#box textarea")
    tab.keyboard.press("Enter")
    _answered(tab)

    system, question = served.speaker.asked[0]
    assert system == {"role": "system", "content": "be brief"}
    assert question["content"] == "one\ntwo"
    sampling = served.speaker.samplings[0]
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (3, 0.5, 7)
    assert "reached max tokens" in tab.locator("#notice").inner_text()


@pytest.mark.slow
def test_a_trunk_that_is_gone_is_told_and_nothing_is_lost(tab: Any, served: Served) -> None:
    served.speaker.broken = "the stream has broken"
    _ask(tab, "Hello")
    tab.wait_for_selector("#notice .problem")
    told = tab.locator("#notice").inner_text()
    served.speaker.broken = ""
    tab.click("#retry")

    assert "trunk at trunk.example:9090 does not answer: the stream has broken" in told
    assert _answered(tab).startswith("2: so it goes")
    assert tab.locator("#notice .problem").count() == 0


@pytest.mark.slow
def test_a_wrong_setting_is_refused_in_words(tab: Any, served: Served) -> None:
    tab.fill("#seed textarea, #seed input", "seven")
    _ask(tab, "Hello")
    tab.wait_for_selector("#notice .problem:has-text(\"'seven' is no whole number\")")

    assert served.speaker.asked == []
    assert tab.locator("#send").is_visible()


@pytest.mark.slow
def test_clear_begins_anew(tab: Any, served: Served) -> None:
    served.speaker.most = 400
    _ask(tab, "Hello")
    tab.wait_for_selector(f"{ANSWERS}:has-text('so it goes')")

    tab.click("#clear")
    tab.wait_for_selector("#chat :text('Write below to begin.')")
    wait(lambda: not any(chat.answering for chat in served.chats._chats.values()))

    assert tab.locator(ANSWERS).count() == 0
    assert tab.locator("#send").is_visible()


@pytest.mark.slow
def test_a_closed_tab_frees_its_conversation(browser: Any, served: Served) -> None:
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(served.address)
    served.speaker.most = 400
    _ask_when_there(tab)
    wait(lambda: any(chat.answering for chat in served.chats._chats.values()))

    context.close()

    wait(lambda: len(served.chats) == 0)


def _ask_when_there(tab: Any) -> None:
    tab.wait_for_selector("#box textarea")
    _ask(tab, "Hello")
