"""Invariant 8: micro-batches under way together equal one at a time, to the bit, and what goes over
the wire depends on the window and the micro-batches alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from conf.schema import TrainConfig
from flower_app.client import streamed
from flower_app.client.step import Outcome
from flower_app.data.client import Batch
from models import Parts, split
from simulations.equality.fold import fold
from strategies.errors import TrunkError
from strategies.transport.frames import read_client_frame
from strategies.transport.stream.channel import Stream
from strategies.transport.stream.link import GrpcLink
from tests.strategies.helpers import (
    CUT,
    connect,
    engine_for,
    largest_difference,
    place,
    random_batch,
    random_steps,
    served,
    tiny_model,
)

STEPS = 3
WINDOWS = (1, 2, 4)
POLICIES: dict[str, dict[str, Any]] = {
    "splitfed-v1": {"strategy": "splitfed-v1"},
    "splitfed-v2": {"strategy": "splitfed-v2", "turns": "ordered"},
    "merged": {"strategy": "merged"},
    "merged-step": {"strategy": "merged", "sync": "step"},
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """See `one_thread`."""


Clients = dict[str, Sequence[Sequence[Batch]]]

ALIKE: Clients = {
    "client-0": random_steps(STEPS, seed=5, accumulate=5),
    "client-1": random_steps(STEPS, seed=6, accumulate=5),
}
UNLIKE: Clients = {
    "client-0": random_steps(STEPS, seed=5, accumulate=1),
    "client-1": random_steps(STEPS, seed=6, accumulate=3),
}
"""The numbers of micro-batches, and so the turns of forward and backward, differ."""


def trained(
    policy: str, window: int, clients: Clients, dropout: float = 0.0
) -> tuple[list[Outcome], list[torch.nn.Module]]:
    """What a round over gRPC comes to: the clients' losses, the trunk and everybody's ends."""
    train = TrainConfig(lr=1e-2, clip=1.0, accumulate=5, **POLICIES[policy])
    # Its embedding is tied to its head: the order in which gradients add up counts.
    trunk = split(tiny_model("gpt2", resid_pdrop=dropout), CUT).trunk
    ends = {name: split(tiny_model("gpt2", resid_pdrop=dropout), CUT) for name in clients}
    engine = engine_for(trunk, train)
    if train.sync == "step":
        first: Parts = next(iter(ends.values()))
        engine.policy.start_ends(common(first))
    engine.open_round(1, 1, training=True, cohort=len(clients))
    with served(engine) as service, ThreadPoolExecutor(len(clients)) as pool:
        links = {name: connect(service, name, STEPS) for name in clients}

        def work(name: str) -> Outcome:
            own, steps, here = ends[name], clients[name], place(name)
            outcome = streamed.train(
                own.bottom, own.top, links[name], steps, STEPS, train, here, window=window
            )
            links[name].close()
            return outcome

        outcomes = list(pool.map(work, clients))
        assert engine.in_flight.bytes == 0
    fold(engine, {name: done.tokens for name, done in zip(clients, outcomes, strict=True)})
    return outcomes, [trunk, *(torch.nn.ModuleList([p.bottom, p.top]) for p in ends.values())]


def common(parts: Parts) -> dict[str, torch.Tensor]:
    from models import client_state

    return client_state(parts.bottom, parts.top)


_alone: dict[tuple[str, str], tuple[list[Outcome], list[torch.nn.Module]]] = {}


@pytest.mark.parametrize("window", WINDOWS[1:])
@pytest.mark.parametrize("clients", ["alike", "unlike"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_window_changes_no_bit(policy: str, clients: str, window: int) -> None:
    cohort = ALIKE if clients == "alike" else UNLIKE
    if (policy, clients) not in _alone:
        _alone[policy, clients] = trained(policy, 1, cohort)
    losses, models = _alone[policy, clients]

    found, now = trained(policy, window, cohort)

    assert [done.losses for done in found] == [done.losses for done in losses]
    assert [largest_difference(a, b) for a, b in zip(now, models, strict=True)] == [0, 0, 0]
    assert largest_difference(models[0], split(tiny_model("gpt2"), CUT).trunk) > 1e-3


def test_dropout_is_that_of_the_place_not_of_the_moment() -> None:
    """Both sides work at once, in one process here, and torch has one generator in it."""
    one = {"client-0": ALIKE["client-0"]}
    (alone, models), (_, now) = (trained("splitfed-v1", w, one, dropout=0.2) for w in (1, 4))

    assert largest_difference(now[0], models[0]) == 0
    assert largest_difference(now[1], models[1]) == 0
    assert len(set(alone[0].losses)) == STEPS


def test_an_evaluation_is_the_same_with_several_batches_under_way() -> None:
    parts, batches = split(tiny_model(), CUT), [random_batch(seed) for seed in range(6)]
    found = []
    for window in WINDOWS:
        engine = engine_for(parts.trunk, TrainConfig())
        engine.open_round(1, 1, training=False)
        with served(engine) as service:
            link = connect(service, "a", 0)
            done = streamed.evaluate(
                parts.bottom, parts.top, link, batches, TrainConfig(), window=window
            )
            link.close()
            assert engine.in_flight.bytes == 0
        found.append((done.loss, done.tokens))

    assert found[1:] == found[:1] * 2


def order(window: int, pause: float, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The frames of two steps of five micro-batches, as they leave: letter, step, micro-batch."""
    sent: list[Any] = []
    send, answer = Stream.send, GrpcLink.answer

    def noted(self: Stream, raw: bytes) -> None:
        frame = read_client_frame(raw).head
        body = frame.WhichOneof("body") or ""
        asked = getattr(frame, body)
        if body != "close":
            assert frame.number == len(sent) + 1
            sent.append((body[0].upper(), asked.step, getattr(asked, "micro", 0), frame.seen))
        send(self, raw)

    def slow(self: GrpcLink, kind: str) -> Any:
        time.sleep(pause)
        return answer(self, kind)

    with monkeypatch.context() as patched:
        patched.setattr(Stream, "send", noted)
        patched.setattr(GrpcLink, "answer", slow)
        parts = split(tiny_model(), CUT)
        train = TrainConfig(accumulate=5)
        engine = engine_for(parts.trunk, train)
        engine.open_round(1, 1, training=True)
        steps = random_steps(2, seed=1, accumulate=5)
        with served(engine) as service:
            link = connect(service, "a", 2)
            streamed.train(
                parts.bottom, parts.top, link, steps, 2, train, place("a"), window=window
            )
            link.close()
    return sent


def test_the_order_of_frames_is_that_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    one = order(1, 0.0, monkeypatch)
    assert "".join(frame[0] for frame in one) == "CBCBCBCBCBACBCBCBCBCBA"
    assert [frame[3] for frame in one] == list(range(22)), "one at a time: all before were answered"

    three = order(3, 0.0, monkeypatch)
    assert "".join(frame[0] for frame in three) == "CCCBCBCBBBACCCBCBCBBBA"
    assert three[10:14] == [("A", 0, 0, 10), ("C", 1, 0, 10), ("C", 1, 1, 10), ("C", 1, 2, 10)]
    assert order(3, 0.01, monkeypatch) == three, "whatever the network's pace"


def test_a_step_that_fails_is_told_though_the_next_one_has_begun() -> None:
    """Frames of the next step are under way when the trunk names what is wrong with this one."""
    parts = split(tiny_model(), CUT)
    train = TrainConfig(accumulate=2)
    engine = engine_for(parts.trunk, train)
    engine.open_round(1, 1, training=True)
    steps = random_steps(3, seed=1, accumulate=2)
    with served(engine) as service:
        link = connect(service, "a", 3)
        usual = link.apply
        link.apply = lambda step, counters, gradients=None: usual(  # type: ignore[method-assign]
            step, type(counters)(**{**vars(counters), "tokens": 10**6}), gradients
        )
        with pytest.raises(TrunkError, match=r"step 0 reports 1000000 tokens"):
            streamed.train(parts.bottom, parts.top, link, steps, 3, train, place("a"), window=4)
    assert engine.in_flight.bytes == 0


def test_the_next_steps_forwards_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """splitfed-v2: a step's end gives the turn away, though the next step's forwards follow it."""
    train = TrainConfig(strategy="splitfed-v2", turns="ordered", accumulate=2)
    engine = engine_for(split(tiny_model(), CUT).trunk, train)
    engine.open_round(1, 1, training=True, cohort=2)
    done: list[tuple[str, int]] = []
    lock = threading.Lock()
    from strategies.engine.session import Session

    usual = Session.compute

    def noted(self: Session, step: int, *rest: Any, **how: Any) -> torch.Tensor:
        output = usual(self, step, *rest, **how)
        with lock:
            done.append((self.client, step))
        return output

    monkeypatch.setattr(Session, "compute", noted)
    with served(engine) as service, ThreadPoolExecutor(2) as pool:

        def work(name: str) -> None:
            parts, steps = split(tiny_model(), CUT), random_steps(3, seed=1, accumulate=2)
            link = connect(service, name, 3)
            streamed.train(parts.bottom, parts.top, link, steps, 3, train, place(name), window=4)
            link.close()

        list(pool.map(work, ("a", "b")))

    assert done == [(name, step) for step in range(3) for name in "ab" for _ in range(2)]
