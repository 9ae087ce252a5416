"""Ordered turns repeat bit for bit, whoever is quicker, and nobody is waited for in vain."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from conf.rules import ConfigError
from conf.schema import TrainConfig
from flower_app.client import streamed
from models import client_state, split
from simulations.equality.local_link import LocalLink
from strategies.engine.member import Member, Round
from strategies.engine.policies.turns import Turn
from strategies.engine.session import Session
from strategies.errors import TrunkError
from strategies.optim import trainable
from tests.strategies.helpers import (
    CUT,
    engine_for,
    place,
    random_batch,
    random_steps,
    tiny_model,
    twin,
)

ROUND = Round(number=1, rounds=1, training=True)
ORDERED = TrainConfig(strategy="splitfed-v2", turns="ordered", lr=0.01)


class Restless(LocalLink):
    """A link on which every call may take a while."""

    def __init__(
        self, session: Session, delays: random.Random, turns: list[tuple[int, str]]
    ) -> None:
        super().__init__(session)
        self.delays = delays
        compute = self.compute

        def slowly(*args: Any, **how: Any) -> Any:
            time.sleep(delays.random() * 0.02)
            answer = compute(*args, **how)
            turns.append((args[0], session.client))  # while the turn is held
            return answer

        self.compute = slowly

    def apply(self, *args: Any) -> Any:
        time.sleep(self.delays.random() * 0.02)
        return super().apply(*args)


def train(
    counts: Sequence[int],
    delays: int,
    *,
    settings: TrainConfig = ORDERED,
    timeout: float = 20.0,
    cohort: int = 0,
    turns: list[tuple[int, str]] | None = None,
) -> tuple[list[dict[str, torch.Tensor]], list[Any]]:
    """A round of clients with so many steps each, at once: the trunk and all ends, and outcomes."""
    model = tiny_model()
    whole = split(model, CUT)
    engine = engine_for(whole.trunk, settings, timeout=timeout)
    ends = [split(twin(model), CUT) for _ in counts]
    engine.open_round(1, 1, training=True, cohort=cohort or len(counts))
    chance = random.Random(delays)

    def work(number: int) -> Any:
        time.sleep(chance.random() * 0.05)
        name, count = f"client-{number}", counts[number]
        session = engine.open(name, client=name, steps=count)
        link = Restless(session, random.Random(delays + number), [] if turns is None else turns)
        steps = random_steps(count, seed=1000 * number)

        try:
            return streamed.train(
                ends[number].bottom, ends[number].top, link, steps, count, settings, place(name)
            )
        finally:
            session.close()

    with ThreadPoolExecutor(len(counts)) as pool:
        outcomes = list(pool.map(work, range(len(counts))))
    engine.close_round()
    states = [client_state(one.bottom, one.top) for one in ends]
    trunk = {str(i): p.detach() for i, p in enumerate(trainable(whole.trunk))}
    return [trunk, *states], outcomes


def equal(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        torch.equal(left[name], right[name])
        for left, right in zip(one, other, strict=True)
        for name in left
    )


@pytest.mark.parametrize("counts", [(4, 4), (5, 1, 3)])
def test_the_result_does_not_depend_on_who_is_quicker(counts: tuple[int, ...]) -> None:
    turns: list[tuple[int, str]] = []
    first, outcomes = train(counts, delays=0, turns=turns)

    assert len(turns) == sum(counts)
    assert turns == sorted(turns), "everybody's first step, then everybody's second"
    assert [outcome.steps for outcome in outcomes] == list(counts)
    for delays in (100, 200, 300):
        assert equal(train(counts, delays)[0], first)


def test_a_client_that_dies_holds_nobody_up() -> None:
    model = tiny_model()
    parts = split(model, CUT)
    engine = engine_for(parts.trunk, ORDERED, timeout=20.0)
    engine.open_round(1, 1, training=True, cohort=2)
    gone = engine.open("a", client="a", steps=5)
    stays = engine.open("b", client="b", steps=2)
    batch = random_batch(0)
    h = parts.bottom(batch.input_ids, batch.attention_mask).detach()
    gone.compute(0, 0, h, None)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stays.compute, 0, 0, h, None)
        time.sleep(0.1)
        assert not waiting.done(), "it is a's turn"
        gone.close()
        waiting.result(5)
    stays.close()
    engine.close_round()


def test_who_never_comes_is_waited_for_a_while_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        _, outcomes = train((2, 2), 0, timeout=2.0, cohort=3)

    assert [outcome.steps for outcome in outcomes] == [2, 2]
    assert caplog.text.count("2 of 3 clients of the cohort have come within 1 s") == 1


def test_who_will_not_come_is_not_waited_for() -> None:
    parts = split(tiny_model(), CUT)
    engine = engine_for(parts.trunk, ORDERED, timeout=60.0)
    engine.open_round(1, 1, training=True, cohort=2)
    session = engine.open("b", client="b", steps=1)
    batch = random_batch(0)
    h = parts.bottom(batch.input_ids, batch.attention_mask).detach()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(session.compute, 0, 0, h, None)
        time.sleep(0.1)
        assert not waiting.done()
        engine.miss()
        waiting.result(5)
    engine.close_round()


def test_every_round_begins_with_its_whole_cohort() -> None:
    parts = split(tiny_model(), CUT)
    engine = engine_for(parts.trunk, ORDERED, timeout=0.5)
    batch = random_batch(0)
    h = parts.bottom(batch.input_ids, batch.attention_mask).detach()
    for number in (1, 2):
        engine.open_round(number, 2, training=True, cohort=2)
        for name in ("a", "b"):
            engine.open(name, client=name, steps=1)
        with pytest.raises(TrunkError, match="no turn at the shared trunk within 0.5 s"):
            engine._sessions["b"].compute(0, 0, h, None)
        engine._sessions["a"].compute(0, 0, h, None)
        engine.close_round()


def test_by_arrival_who_asks_again_at_once_comes_after_those_who_wait() -> None:
    """Else a client on a fast network would keep those on a slow one out."""
    turn, got = Turn(), list[str]()
    quick, *slow = (Member(client=name, steps=1, round=ROUND) for name in ("quick", "b", "c"))

    def once(member: Member) -> None:
        turn.take(member, 20.0)
        got.append(member.client)
        turn.release(member)

    turn.take(quick, 20.0)
    for _ in range(5):
        got.clear()
        with ThreadPoolExecutor(2) as pool:
            for member in slow:
                pool.submit(once, member)
                time.sleep(0.05)
            turn.release(quick)
            turn.take(quick, 20.0)
            assert got == ["b", "c"]


def test_who_waits_in_vain_leaves_the_queue() -> None:
    turn = Turn()
    holder, late, next_one = (Member(client=name, steps=1, round=ROUND) for name in ("a", "b", "c"))
    turn.take(holder, 1.0)
    with pytest.raises(TrunkError, match=r"no turn at the shared trunk within 0\.01 s"):
        turn.take(late, 0.01)
    turn.release(holder)
    turn.take(next_one, 1.0)
    assert turn.held_by(next_one)


@pytest.mark.parametrize("strategy", ["splitfed-v1", "merged"])
def test_only_splitfed_v2_takes_turns(strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"turns=ordered needs train.strategy=splitfed-v2, not"):
        TrainConfig(strategy=strategy, turns="ordered")
