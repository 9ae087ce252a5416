"""Replies are waited for as long as it makes sense, and belong to the message that they answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from strategies import mail as replies
from strategies.mail import exchange, push, receive


@dataclass(frozen=True)
class Gone:
    since: float
    done: int = 3
    steps: int = 40


class Mail:
    """A grid without nodes: `arrive` is called before every pull."""

    def __init__(self, arrive: Callable[[Mail, int], None] = lambda mail, pull: None) -> None:
        self.arrive, self.pulls = arrive, 0
        self.sent: list[Message] = []
        self.inbox: list[Message] = []
        self.refused: set[int] = set()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.sent)}"
            self.sent.append(message)
        taken = [m for m in messages if m.metadata.dst_node_id not in self.refused]
        return [m.metadata.message_id for m in taken]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Everything that is there, asked for or not: more than Flower would do wrong."""
        self.pulls += 1
        self.arrive(self, self.pulls)
        inbox, self.inbox = self.inbox, []
        return inbox

    def answer(self, *nodes: int) -> None:
        for message in self.sent:
            if message.metadata.dst_node_id in nodes:
                content = RecordDict({"outcome": ConfigRecord({"client": "c", "error": ""})})
                self.inbox.append(Message(content, reply_to=message))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(replies, "FIRST_PAUSE", 0.01)
    return


def messages(*nodes: int) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in nodes]


def told(found: Iterable[Message]) -> dict[int, str]:
    """Nodes in the order of their replies, with the reason of those that are errors."""
    return {
        reply.metadata.src_node_id: reply.error.reason if reply.has_error() else ""
        for reply in found
    }


def run(mail: Any, nodes: Iterable[int], timeout: float = 5, **options: Any) -> dict[int, str]:
    return told(exchange(mail, messages(*nodes), timeout=timeout, **options))


def test_replies_come_as_they_arrive() -> None:
    mail = Mail(lambda mail, pull: mail.answer(4 - pull))

    assert list(run(mail, [1, 2, 3])) == [3, 2, 1]
    assert mail.pulls == 3


def test_silence_ends_at_the_deadline_with_a_reason() -> None:
    mail = Mail(lambda mail, pull: mail.answer(1) if pull == 1 else None)
    started = time.monotonic()

    found = run(mail, [1, 2], timeout=0.2)

    assert found == {1: "", 2: "no answer within federation.round_timeout=0.2 s"}
    assert 0.2 <= time.monotonic() - started < 1


def test_the_first_that_suffice_end_the_wait() -> None:
    mail, got = Mail(lambda mail, pull: mail.answer(pull)), []
    found = exchange(mail, messages(1, 2, 3, 4), timeout=5, enough=lambda: len(got) >= 2)  # type: ignore[arg-type]

    for reply in found:
        if not reply.has_error():
            got.append(reply.metadata.src_node_id)
        else:
            assert reply.error.reason == "not needed: 2 of 4 answered first"

    assert got == [1, 2]
    assert mail.pulls == 2


def test_replies_that_arrive_together_with_the_last_needed_one_are_not_needed() -> None:
    mail = Mail(lambda mail, pull: mail.answer(1, 2, 3))
    got: list[Message] = []
    for reply in exchange(mail, messages(1, 2, 3), timeout=5, enough=lambda: len(got) >= 2):  # type: ignore[arg-type]
        if not reply.has_error():
            got.append(reply)

    assert len(got) == 2


def test_a_node_whose_stream_broke_is_given_up_and_one_that_works_is_waited_for() -> None:
    broke = {2: Gone(time.monotonic() - 31)}
    started = time.monotonic()
    mail = Mail(lambda mail, pull: mail.answer(1) if pull == 5 else None)

    found = run(mail, [1, 2], broken=broke.get, lost_after=30)

    assert found[1] == ""
    assert found[2].startswith("its stream broke after step 3 of 40 and no answer came within 31")
    assert mail.pulls == 5
    assert time.monotonic() - started < 1, "not before the deadline only"


def test_a_broken_stream_leaves_time_for_the_answer() -> None:
    """A client that failed says why: its reply comes after its stream has ended."""
    broke = {1: Gone(time.monotonic())}
    mail = Mail(lambda mail, pull: mail.answer(1) if pull == 4 else None)

    assert run(mail, [1], broken=broke.get, lost_after=30) == {1: ""}


def test_a_late_reply_to_an_earlier_message_is_nobodys() -> None:
    """Of the same node, well-formed, and there before this round's: it is taken for nothing."""
    mail = Mail(lambda mail, pull: None)
    run(mail, [1, 2], timeout=0.02)
    early = list(mail.sent)

    def arrive(mail: Mail, pull: int) -> None:
        if pull == 1:
            mail.inbox += [Message(RecordDict(), reply_to=message) for message in early]
        if pull == 2:
            mail.answer(2)

    mail.arrive, mail.pulls = arrive, 0
    replies_of_2 = list(exchange(mail, messages(1, 2), timeout=0.1))  # type: ignore[arg-type]

    assert told(replies_of_2) == {2: "", 1: "no answer within federation.round_timeout=0.1 s"}
    assert "outcome" in replies_of_2[0].content, "this round's, not the empty late one"


def test_flowers_own_word_on_a_lost_node_counts_as_that_nodes_answer() -> None:
    """SuperLink answers for a node that left, under its own id."""

    def arrive(mail: Mail, pull: int) -> None:
        lost = Message(Error(code=5, reason="node unavailable"), reply_to=mail.sent[0])
        lost.metadata.__dict__["_src_node_id"] = 1
        mail.inbox.append(lost)

    assert run(Mail(arrive), [77]) == {77: "node unavailable"}


def test_a_message_that_flower_does_not_take_is_not_waited_for() -> None:
    mail = Mail(lambda mail, pull: mail.answer(1))
    mail.refused = {2}

    assert run(mail, [1, 2]) == {2: "Flower took no message for it", 1: ""}
    assert run(mail, []) == {}


def test_what_was_not_answered_can_be_received_later() -> None:
    mail = Mail(lambda mail, pull: mail.answer(1))
    waiting, _ = push(mail, messages(1, 2))  # type: ignore[arg-type]

    assert set(told(receive(mail, waiting, timeout=0.02))) == {1}  # type: ignore[arg-type]
    mail.arrive = lambda mail, pull: mail.answer(2)
    assert set(told(receive(mail, waiting, timeout=0))) == {2}  # type: ignore[arg-type]
    assert not waiting
