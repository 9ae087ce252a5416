"""Who is asked who it is, what is believed, and who is drawn."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from conf.schema import Config, FederationConfig, LinkConfig, TrainConfig
from strategies.rounds import roster as module
from strategies.rounds.roster import Profile, Roster, choose, quorum, sizes

KEY = bytes(range(32))
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
    roster, nodes = Roster(config()), Nodes(n7={"client": "b"}, n5={"client": "a"})

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
    Roster(dataclasses.replace(Config(), **changes)).gather(nodes)  # type: ignore[arg-type]

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
    roster, nodes = Roster(config()), Nodes(n1={}, n2=answer)

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
        Roster(config(min_clients=2)).gather(nodes)  # type: ignore[arg-type]


def test_a_node_that_left_gives_its_name_back() -> None:
    """A SuperNode that was started again has a new id."""
    roster, nodes = Roster(config()), Nodes(n1={"client": "a"}, n2={})
    gather(roster, nodes)

    del nodes.says[1]
    nodes.says[8] = {"client": "a"}

    assert gather(roster, nodes) == ["a", "c2"]
    assert roster[8].client == "a"
    with pytest.raises(KeyError):
        roster[1]


def test_a_silent_newcomer_holds_up_one_round_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    roster, nodes = Roster(config(round_timeout=60, grace=0.2)), Nodes(n1={})
    gather(roster, nodes)
    nodes.says[2] = None

    started = time.monotonic()
    assert gather(roster, nodes) == ["c1"]
    assert 0.2 <= time.monotonic() - started < 5
    started = time.monotonic()
    assert gather(roster, nodes) == ["c1"]
    assert time.monotonic() - started < 0.1


def profiles(*examples: int) -> list[Profile]:
    return [
        Profile(node=9 - i, client=f"c{i}", bottom=1, top=1, rank=8, examples=count)
        for i, count in enumerate(examples)
    ]


def drawn(draw: Callable[[int], list[Profile]], times: int) -> Counter[str]:
    return Counter(profile.client for seed in range(times) for profile in draw(seed))


def test_weighted_draws_follow_the_examples() -> None:
    """One of four: shares of the examples. Two of three: as if drawn one after the other."""
    some = profiles(10, 20, 30, 40)
    count = drawn(lambda seed: choose(some, 1, seed, weighted=True), 8000)
    shares = [count[p.client] / 8000 for p in some]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)

    pair = profiles(1, 1, 2)
    count = drawn(lambda seed: choose(pair, 2, seed, weighted=True), 8000)
    # c2 is first (1/2), or second after c0 or c1 (1/4 each, then 2 of 3 are left): 5/6.
    assert count["c2"] / 8000 == pytest.approx(5 / 6, abs=0.02)
    assert count["c0"] / 8000 == pytest.approx(7 / 12, abs=0.02)


def test_uniform_draws_ignore_the_examples() -> None:
    some = profiles(1, 1000, 0)
    count = drawn(lambda seed: choose(some, 1, seed, weighted=False), 6000)
    assert [count[p.client] / 6000 for p in some] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_draws_go_by_name_and_seed() -> None:
    some = profiles(5, 5, 5, 5, 5)
    others = [dataclasses.replace(p, node=100 + p.node) for p in reversed(some)]

    one = [p.client for p in choose(some, 2, 1, weighted=True)]

    assert one == [p.client for p in choose(others, 2, 1, weighted=True)]
    assert one == sorted(one)
    assert len({tuple(p.client for p in choose(some, 2, s, weighted=True)) for s in range(30)}) > 3


def test_nobody_is_asked_first_in_every_round() -> None:
    """One by one, the first asked are the first to answer; an attempt keeps its round's order."""
    roster, some = Roster(config()), profiles(1, 1, 1)
    orders = [[p.client for p in roster.draw(some, 3, number)] for number in range(30)]

    assert {order[0] for order in orders} == {"c0", "c1", "c2"}
    again = [[p.client for p in roster.draw(some, 3, number, 2)] for number in range(30)]
    assert orders == again


def test_clients_without_examples_and_those_just_lost_come_last() -> None:
    for seed in range(30):
        names = [p.client for p in choose(profiles(0, 1, 1), 2, seed, weighted=True)]
        assert names == ["c1", "c2"]
        avoided = choose(profiles(9, 9, 1), 1, seed, weighted=True, avoid=["c0", "c1"])
        assert [p.client for p in avoided] == ["c2"]
    assert len(choose(profiles(9, 9), 2, 0, weighted=True, avoid=["c0", "c1"])) == 2


@pytest.mark.parametrize(
    ("present", "fraction", "oversample", "expected"),
    [
        (10, 1.0, 0.5, (10, 10)),
        (10, 0.5, 0.0, (5, 5)),
        (10, 0.5, 0.2, (5, 6)),
        (10, 0.5, 0.3, (5, 7)),
        (100, 0.5, 0.1, (50, 55)),
        (10, 0.1, 0.0, (2, 2)),
        (100, 0.3, 4.0, (30, 100)),
    ],
)
def test_sizes(present: int, fraction: float, oversample: float, expected: tuple[int, int]) -> None:
    federation = FederationConfig(min_clients=2, oversample=oversample)
    assert sizes(present, fraction, federation) == expected


def test_quorum_is_a_share_rounded_up_and_never_nobody() -> None:
    assert [quorum(10, share) for share in (0.0, 0.05, 0.7, 0.71, 1.0)] == [1, 1, 7, 8, 10]
    assert quorum(100, 0.55) == 55
