"""The chat in a real browser: what is typed, streamed, stopped, tried again, edited, taken back."""

from __future__ import annotations

from typing import Any

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
