"""Nobody waits for work that others' threads do: members come, go and ask while it runs."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from conf.schema import TrainConfig
from models import split
from strategies.engine.engine import TrunkEngine
from strategies.engine.member import Member, Round
from strategies.engine.policies.batches import Batch, Runner
from strategies.engine.policies.meeting import Meeting, Request
from strategies.engine.policies.merged import Merged
from strategies.engine.session import Session
from strategies.errors import TrunkError
from tests.strategies.helpers import CUT, H, engine_for, largest_difference, tiny_model
from tests.strategies.pauses import PATIENT, Pause, at_once


def member(client: str, cohort: int = 1) -> Member:
    round = Round(number=1, rounds=1, training=True, cohort=cohort)
    return Member(client=client, steps=3, round=round)


class Worked:
    """A meeting's work that keeps what it was given, and stops in its first call."""

    def __init__(self, pause: Pause, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self._pause, self._error = pause, error
        self.meeting = Meeting(("one", "two"), self, PATIENT)

    def __call__(self, kind: str, requests: list[Request]) -> None:
        self.calls.append((kind, [request.member.client for request in requests]))
        if len(self.calls) == 1:
            self._pause.stop()
            if self._error is not None:
                raise self._error
        for request in requests:
            request.answer = f"{kind} of {request.member.client}"

    def asks(self, pool: ThreadPoolExecutor, who: Member, kind: str = "one") -> Future[Any]:
        return pool.submit(self.meeting.ask, Request(who, kind, ()))


def waits(meeting: Meeting, who: Member) -> None:
    """Come back when its request is known."""
    end = time.monotonic() + PATIENT
    while meeting._members[who] is None:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_others_join_ask_leave_and_are_missed_while_the_work_runs(
    pool: ThreadPoolExecutor, pause: Pause
) -> None:
    worked = Worked(pause)
    meeting, (first, late, gone) = worked.meeting, (member("a"), member("b"), member("c"))
    meeting.join(first)
    served = worked.asks(pool, first)
    pause.wait()

    at_once(pool, lambda: meeting.join(late))
    at_once(pool, lambda: meeting.join(gone))
    at_once(pool, meeting.miss)
    waiting = [worked.asks(pool, late), worked.asks(pool, gone)]
    for each in (late, gone):
        waits(meeting, each)
    at_once(pool, lambda: meeting.leave(gone, TrunkError("gone", kind="closed")))
    with pytest.raises(TrunkError, match="gone"):
        waiting[1].result(PATIENT)
    assert worked.calls == [("one", ["a"])]
    assert not served.done()

    pause.go.set()
    assert served.result(PATIENT) == "one of a"
    assert not waiting[0].done(), "the first has not asked again"
    worked.asks(pool, first)
    assert waiting[0].result(PATIENT) == "one of b"
    assert worked.calls == [("one", ["a"]), ("one", ["a", "b"])]


def test_who_leaves_while_it_is_served_hears_so_at_once(
    pool: ThreadPoolExecutor, pause: Pause
) -> None:
    worked = Worked(pause)
    one, other = member("a", cohort=2), member("b", cohort=2)
    for each in (one, other):
        worked.meeting.join(each)
    asked = {each: worked.asks(pool, each) for each in (one, other)}
    pause.wait()
    done: list[str] = []

    at_once(pool, lambda: worked.meeting.leave(other, TrunkError("gone", kind="closed")))
    at_once(pool, lambda: worked.meeting.note(lambda: done.append("changed")))
    assert not done, "the work reads this"
    pause.go.set()

    assert asked[one].result(PATIENT) == "one of a"
    with pytest.raises(TrunkError, match="gone"):
        asked[other].result(PATIENT)
    assert done == ["changed"]
    assert worked.asks(pool, one, "two").result(PATIENT) == "two of a"


@pytest.mark.parametrize("error", [TrunkError("bad"), KeyError("a mistake")])
def test_an_error_of_the_work_is_everybodys_answer_and_the_work_is_not_done_again(
    pool: ThreadPoolExecutor, pause: Pause, error: Exception
) -> None:
    worked = Worked(pause, error)
    members = [member(client, cohort=2) for client in "ab"]
    for each in members:
        worked.meeting.join(each)
    asked = [worked.asks(pool, each) for each in members]
    pause.wait()
    done: list[str] = []
    worked.meeting.note(lambda: done.append("changed"))
    pause.go.set()

    for each in asked:
        with pytest.raises(type(error)):
            each.result(PATIENT)
    assert done == ["changed"]
    assert [len(worked.calls), *worked.calls[0]] == [1, "one", ["a", "b"]]
    again = [worked.asks(pool, each, "two") for each in members]
    assert {each.result(PATIENT) for each in again} == {"two of a", "two of b"}


def test_past_the_deadline_who_waits_sleeps(pool: ThreadPoolExecutor, pause: Pause) -> None:
    """One of three never comes, one has joined and thinks: the third must not spin meanwhile."""
    worked = Worked(pause)
    pause.go.set()
    meeting = worked.meeting
    meeting._patience = 0.0
    waits: list[float | None] = []
    wait = meeting.changed.wait
    meeting.changed.wait = lambda timeout=None: waits.append(timeout) or wait(timeout)  # type: ignore[method-assign,func-returns-value,misc]
    one, other = member("a", cohort=3), member("b", cohort=3)
    for each in (one, other):
        meeting.join(each)
    first = worked.asks(pool, one)
    while not waits:
        pass
    second = worked.asks(pool, other)

    assert {first.result(PATIENT), second.result(PATIENT)} == {"one of a", "one of b"}
    assert waits == [None]


# With the engine: what leaves or comes during the work changes no bit.


def open_engine() -> TrunkEngine:
    train = TrainConfig(strategy="merged", optimizer="sgd", lr=0.1, clip=0.0)
    engine = engine_for(split(tiny_model(), CUT).trunk, train, timeout=PATIENT)
    engine.open_round(1, 1, training=True, cohort=2)
    return engine


def open_two(engine: TrunkEngine) -> list[Session]:
    return [engine.open(client, client=client, steps=3) for client in "ab"]


def compute(session: Session) -> torch.Tensor:
    return session.compute(0, 0, H * ord(session.client[0]), None)


def back(session: Session) -> tuple[Any, float]:
    return session.backward(0, 0, H, last=True, tokens=8)


def apply(session: Session) -> float:
    return session.apply(0, client_square_norm=1.0, tokens=8).grad_norm


def test_a_latecomer_opens_its_session_while_a_forward_runs(
    pool: ThreadPoolExecutor, pause: Pause, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = open_engine()
    expected = list(pool.map(compute, open_two(still)))
    run = Runner.__call__
    monkeypatch.setattr(Runner, "__call__", lambda *args: pause.stop() or run(*args))  # type: ignore[func-returns-value]
    engine = open_engine()
    answers = [pool.submit(compute, session) for session in open_two(engine)]
    pause.wait()

    at_once(pool, lambda: engine.open("c", client="c", steps=3))
    assert engine.sessions() == 3
    at_once(pool, engine.miss)
    assert not any(answer.done() for answer in answers)

    pause.go.set()
    for answer, right in zip(answers, expected, strict=True):
        assert torch.equal(answer.result(PATIENT), right)


@pytest.mark.parametrize("serves", [True, False], ids=["the server", "another"])
@pytest.mark.parametrize("during", ["__init__", "backward"])
def test_leaving_during_the_work_is_leaving_right_after_it(
    pool: ThreadPoolExecutor,
    pause: Pause,
    monkeypatch: pytest.MonkeyPatch,
    during: str,
    serves: bool,
) -> None:
    """Whether its forward or its backward runs when it goes, its share is out, to the bit."""
    after = open_engine()
    one, other = open_two(after)
    list(pool.map(compute, (one, other)))
    if during == "__init__":
        other.leave()
        back(one)
    else:
        list(pool.map(back, (one, other)))
        other.leave()
    norm = apply(one)

    own = getattr(Batch, during)

    def stopped(*args: Any, **settings: Any) -> Any:
        answer = own(*args, **settings)
        pause.stop()
        return answer

    engine = open_engine()
    staying, leaving = open_two(engine)
    if during == "backward":
        list(pool.map(compute, (staying, leaving)))
    monkeypatch.setattr(Batch, during, stopped)
    work = compute if during == "__init__" else back
    assert isinstance(engine.policy, Merged)
    assert engine.policy._group is not None
    answers: dict[Session, Future[Any]] = {}
    for session in (staying, leaving) if serves else (leaving, staying):  # the last one serves
        answers[session] = pool.submit(work, session)
        if len(answers) == 1:
            waits(engine.policy._group._meeting, session.member)
    pause.wait()
    at_once(pool, leaving.leave)
    pause.go.set()
    answers[staying].result(PATIENT)
    with pytest.raises(TrunkError, match="the session has ended"):
        answers[leaving].result(PATIENT)
    if during == "__init__":
        back(staying)

    assert apply(staying) == norm
    assert largest_difference(engine.trunk, after.trunk) == 0
