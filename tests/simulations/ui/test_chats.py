"""Conversations by browser session: one answer at a time, and freed when they are left."""

from __future__ import annotations

import threading

from simulations.ui import live
from simulations.ui.answer import answer
from simulations.ui.chats import Chat, Chats
from simulations.ui.talked import Load, Talked
from tests.simulations.ui.fake import FakeSpeaker, Sampling

ASKED = [{"role": "user", "content": "Hello"}]


def _talked(speaker: FakeSpeaker) -> Talked:
    return Talked(speaker=speaker, trunk="trunk.example:9090")  # type: ignore[arg-type]


def test_a_newer_answer_ends_the_one_before_which_shows_nothing_more() -> None:
    speaker, chat = FakeSpeaker(most=10_000), Chat()
    older = answer(_talked(speaker), chat, ASKED, "", Sampling(max_tokens=10_000))
    next(older), next(older)
    speaker.most = 1
    newer: list[str] = []

    def ask() -> None:
        shown = list(answer(_talked(speaker), chat, ASKED, "", Sampling()))
        newer.append(shown[-1].messages[-1]["content"])

    thread = threading.Thread(target=ask)
    thread.start()
    while chat._turn.locked() and not newer:
        if next(older, None) is None:
            break
    thread.join(10)

    assert newer == ["2: so it goes on and on, "]
    assert list(older) == []


def test_a_chat_that_is_left_shows_nothing_more() -> None:
    chat = Chat()
    going = answer(_talked(FakeSpeaker(most=10_000)), chat, ASKED, "", Sampling(max_tokens=10_000))
    next(going), next(going)
    left = threading.Thread(target=chat.leave)
    left.start()

    assert len(list(going)) <= 1
    left.join(10)
    assert not left.is_alive()


def test_of_too_many_the_longest_idle_is_freed() -> None:
    chats = Chats(most=2)
    first, second = chats.of("first"), chats.of("second")
    first.used, second.used = 2.0, 1.0

    chats.of("third")

    assert chats.of("first") is first
    assert len(chats) == 2
    assert chats.of("second") is not second


def test_figures_by_part_are_those_of_the_tally() -> None:
    speaker = FakeSpeaker(most=4, pace=0.01)
    last = list(answer(_talked(speaker), Chat(), ASKED, "", Sampling()))[-1]

    told = live.figures(_talked(speaker), last.figures, Load(sessions=1, kv_mib=2), going=False)

    assert "1,066 up, 1,058 down" in told
    assert "1 session, 2.0 MiB of KV cache" in told
    assert last.figures.ms_of["trunk"] == 5.0


def test_words_of_a_model_are_not_markup() -> None:
    assert "<script>" not in live.notice("<script>")
    named = FakeSpeaker(name="<b>x")
    assert "<b>" not in live.header(_talked(named))
