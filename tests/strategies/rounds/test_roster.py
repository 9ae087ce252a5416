"""Who is asked who it is, what is believed, and who is drawn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from conf.schema import Config, FederationConfig, LinkConfig, PrivacyConfig, TrainConfig
from strategies.rounds import roster as module
from strategies.rounds.answers import Bounds, Profile
from strategies.rounds.roster import Roster

KEY = bytes(range(32))
BOUNDS = Bounds(blocks=9, width=64, own_cut=True)
TOLD: dict[str, Any] = {
    "cut-bottom": 1, "cut-top": 2, "lora-rank": 8, "examples": 0, "public-key": KEY,
}  # fmt: skip


class Nodes:
    """A grid whose nodes answer questions: with a name and changes, an error, or not at all."""

    def __init__(self, **says: dict[str, Any] | str | None) -> None:
        self.says = {int(node.strip("n")): answer for node, answer in says.items()}
        self.asked: list[int] = []
        self.questions: list[Message] = []
        self._inbox: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.says)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.asked)}"
            self.asked.append(message.metadata.dst_node_id)
            self.questions.append(message)
            self.answer(message)
        return [message.metadata.message_id for message in messages]

    def answer(self, message: Message) -> None:
        says = self.says[message.metadata.dst_node_id]
        if isinstance(says, str):
            reply = Message(Error(code=2, reason=says), reply_to=message)
        elif says is not None:
            says = {"client": f"c{message.metadata.dst_node_id}", "error": "", **TOLD, **says}
            outcome = {key: says.pop(key) for key in ("client", "error")}
            records = {"outcome": ConfigRecord(outcome), "profile": ConfigRecord(says)}
            reply = Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]
        else:
            return
        self._inbox[message.metadata.message_id] = reply

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._inbox.pop(i) for i in message_ids if i in self._inbox]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)


def config(**federation: Any) -> Config:
    """Settings of a federation, and of a link by `grace`."""
    grace = federation.pop("grace", 0.1)
    values = {"min_clients": 1, "round_timeout": 0.2, **federation}
    return Config(federation=FederationConfig(**values), link=LinkConfig(grace=grace))


def gather(roster: Roster, nodes: Any) -> list[str]:
    return [profile.client for profile in roster.gather(nodes)]


def test_every_node_is_asked_once_at_first_sight() -> None:
    roster, nodes = Roster(config(), BOUNDS), Nodes(n7={"client": "b"}, n5={"client": "a"})

    assert gather(roster, nodes) == gather(roster, nodes) == ["a", "b"]

    assert nodes.asked == [5, 7]
    assert roster[7] == Profile(node=7, client="b", bottom=1, top=2, rank=8, public_key=KEY)
    nodes.says[9] = {"client": "late"}
    assert gather(roster, nodes) == ["a", "b", "late"]
    assert nodes.asked == [5, 7, 9]


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({}, False),
        ({"federation": FederationConfig(sampling="weighted", min_clients=1)}, True),
        ({"train": TrainConfig(strategy="merged", global_batch=8)}, True),
    ],
)
def test_examples_are_counted_only_if_somebody_needs_them(
    changes: dict[str, Any], counted: bool
) -> None:
    nodes = Nodes(n1={}, n2={})
    Roster(dataclasses.replace(Config(), **changes), BOUNDS).gather(nodes)  # type: ignore[arg-type]

    ticket = nodes.questions[0].content.config_records["ticket"]
    assert ticket["count-examples"] is counted


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("the process was killed", "the process was killed"),
        ({"error": "no data at /nowhere"}, "no data at /nowhere"),
        ({"client": ""}, "it says it is called ''"),
        ({"public-key": b"short"}, "c2 shows no key to make its tickets for"),
        ({"public-key": bytes(32)}, "c2 shows no key to make its tickets for"),  # a weak point
        ({"client": 3}, "it says it is called 3"),
        ({"cut-top": -1}, "c2 says cut-top=-1"),
        ({"lora-rank": 0}, "c2 says lora-rank=0"),
        ({"examples": 1.5}, "c2 says examples=1.5"),
        ({"cut-bottom": True}, "c2 says cut-bottom=True"),
        ({"client": "c1"}, "it is called 'c1' like node 1"),
        (None, "it has not yet said who it is"),
    ],
)
def test_a_node_that_answers_nonsense_is_not_drawn_and_asked_again_later(
    answer: Any, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    roster, nodes = Roster(config(), BOUNDS), Nodes(n1={}, n2=answer)

    assert gather(roster, nodes) == ["c1"]

    assert f"node 2 does not take part: {word}" in caplog.text
    if answer is None:  # it has its question; it may still answer it
        nodes.says[2] = {}
        nodes.answer(nodes.questions[-1])
    nodes.says[2] = {}
    assert gather(roster, nodes) == ["c1", "c2"]


def test_too_few_nodes_that_can_take_part_end_the_run_with_every_reason() -> None:
    nodes = Nodes(n1="killed", n2={"error": "no data"}, n3={})

    with pytest.raises(RuntimeError, match=r"1 of 3 .*min_clients=2 .*1: killed; node 2: no data"):
        Roster(config(min_clients=2), BOUNDS).gather(nodes)  # type: ignore[arg-type]


def test_a_name_stays_with_the_node_that_used_it_first() -> None:
    """Another node is refused while it is here and when it has gone; it may come back itself."""
    roster, nodes = Roster(config(), BOUNDS), Nodes(n1={"client": "a"}, n2={})
    gather(roster, nodes)

    del nodes.says[1]
    nodes.says[8] = {"client": "a", "public-key": KEY[::-1]}
    assert gather(roster, nodes) == ["c2"]
    nodes.says[1] = {"client": "a", "public-key": KEY[::-1]}  # its state is lost, its id is not
    assert gather(roster, nodes) == ["a", "c2"]

    assert roster[1].client == "a"
    with pytest.raises(KeyError):
        roster[8]


def test_who_squats_a_name_is_told_whose_it_is(caplog: pytest.LogCaptureFixture) -> None:
    roster, nodes = Roster(config(), BOUNDS), Nodes(n1={"client": "a"}, n2={})
    gather(roster, nodes)

    del nodes.says[1]
    nodes.says[8] = {"client": "a", "public-key": KEY[::-1]}
    gather(roster, nodes)

    assert "node 8 does not take part: it is called 'a' like node 1, which has left" in caplog.text


def test_questions_live_as_long_as_answers_are_waited_for() -> None:
    nodes = Nodes(n1={})

    Roster(config(round_timeout=86_400.0), BOUNDS).gather(nodes)  # type: ignore[arg-type]

    assert nodes.questions[0].metadata.ttl > 86_400


def test_a_node_that_comes_back_under_its_key_has_its_name() -> None:
    """Flower may give it a new id."""
    roster, nodes = Roster(config(), BOUNDS), Nodes(n1={"client": "a"}, n2={})
    gather(roster, nodes)

    del nodes.says[1]
    nodes.says[8] = {"client": "a"}

    assert gather(roster, nodes) == ["a", "c2"]
    assert roster[8].client == "a"
    with pytest.raises(KeyError):
        roster[1]


def test_a_name_stays_with_its_node_across_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    """Keys are new then, and ids are not: the owner comes back, nobody takes its place."""
    before = Roster(config(), BOUNDS)
    gather(before, Nodes(n7={"client": "a"}, n8={"client": "b"}))
    new = {"public-key": KEY[::-1]}
    roster, nodes = Roster(config(), BOUNDS), Nodes(n3={"client": "a"}, n8={"client": "b", **new})
    roster.keep(before.names)

    assert gather(roster, nodes) == ["b"]
    assert "it is called 'a', which was node 7 before this run was resumed" in caplog.text
    nodes.says[7] = {"client": "a", **new}
    assert gather(roster, nodes) == ["a", "b"]
    assert roster.names == {"a": 7, "b": 8}


def test_the_key_of_the_run_before_counts_and_not_that_of_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    masked = dataclasses.replace(config(), privacy=PrivacyConfig(ends="masked"))
    roster = Roster(masked, BOUNDS)
    roster.keep({}, b"the key.")

    alike = {"cut-bottom": 1, "cut-top": 1, "lora-rank": masked.lora.rank}
    other = {**alike, "client": "a", "key-check": b"another."}
    nodes = Nodes(n1=other, n2={**alike, "key-check": b"the key."})
    assert gather(roster, nodes) == ["c2"]
    assert "a has another site key (check " in caplog.text
    assert gather(Roster(masked, BOUNDS), nodes) == ["a"], "at first nobody knows which is right"


def test_names_are_free_after_a_resume_in_which_every_node_is_new() -> None:
    """As in a simulation, or without SuperNode authentication."""
    roster = Roster(config(), BOUNDS)
    roster.keep({"a": 7, "b": 8})

    assert gather(roster, Nodes(n1={"client": "a"}, n2={"client": "b"})) == ["a", "b"]


def test_a_silent_newcomer_holds_up_one_round_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    roster, nodes = Roster(config(round_timeout=60, grace=0.2), BOUNDS), Nodes(n1={})
    gather(roster, nodes)
    nodes.says[2] = None

    started = time.monotonic()
    assert gather(roster, nodes) == ["c1"]
    assert 0.2 <= time.monotonic() - started < 5
    started = time.monotonic()
    assert gather(roster, nodes) == ["c1"]
    assert time.monotonic() - started < 0.1
