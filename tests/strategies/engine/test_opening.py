"""A replica is copied without the engine's lock: nobody else waits for it but the round's end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from torch import nn

from strategies.engine.engine import TrunkEngine
from strategies.engine.policies import splitfed_v1
from strategies.engine.policies.splitfed_v1 import SplitFedV1
from strategies.engine.session import Session
from strategies.errors import TrunkError
from tests.strategies.helpers import open_engine
from tests.strategies.pauses import PATIENT, Pause, at_once

Opening = tuple[TrunkEngine, Future[Session]]


@pytest.fixture
def opening(pool: ThreadPoolExecutor, pause: Pause, monkeypatch: pytest.MonkeyPatch) -> Opening:
    """An engine of which session `a` is being opened: the trunk's copy has begun."""
    copy: Callable[[nn.Module], nn.Module] = splitfed_v1.replicate
    copies: list[Any] = []

    def first_stops(trunk: nn.Module) -> nn.Module:
        copies.append(trunk)
        if len(copies) == 1:
            pause.stop()
        return copy(trunk)

    monkeypatch.setattr(splitfed_v1, "replicate", first_stops)
    engine = open_engine(strategy="splitfed-v1")
    first = pool.submit(engine.open, "a", client="a", steps=1)
    pause.wait()
    return engine, first


def test_others_open_and_are_missed_while_a_replica_is_copied(
    pool: ThreadPoolExecutor, pause: Pause, opening: Opening
) -> None:
    engine, first = opening

    at_once(pool, lambda: engine.open("b", client="b", steps=1))
    at_once(pool, engine.miss)
    assert engine.sessions() == 1
    assert not engine.has("a")
    with pytest.raises(TrunkError, match="was opened before"):
        at_once(pool, lambda: engine.open("a", client="a", steps=1))

    pause.go.set()
    assert not first.result(PATIENT).closed
    assert engine.sessions() == 2


def test_the_round_ends_with_what_was_being_opened(
    pool: ThreadPoolExecutor, pause: Pause, opening: Opening
) -> None:
    engine, first = opening

    end = pool.submit(engine.close_round)
    while engine._round is not None:
        pass
    with pytest.raises(TrunkError, match="no round is open"):
        at_once(pool, lambda: engine.open("b", client="b", steps=1))
    assert not end.done()

    pause.go.set()
    end.result(PATIENT)
    assert first.result(PATIENT).closed
    assert isinstance(engine.policy, SplitFedV1)
    assert not engine.policy._replicas


def test_a_session_that_cannot_be_opened_may_be_opened_again(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(strategy="splitfed-v1")
    with monkeypatch.context() as broken:
        broken.setattr(splitfed_v1, "replicate", lambda trunk: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.open("a", client="a", steps=1)

    engine.open("a", client="a", steps=1)
    at_once(pool, engine.close_round)
