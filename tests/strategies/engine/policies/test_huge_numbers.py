"""One client's finite but huge numbers cost it its session, and nobody else anything."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from conf.schema import TrainConfig
from models import split
from strategies.engine.checks import LARGEST
from strategies.engine.engine import TrunkEngine
from strategies.engine.session import Session
from strategies.errors import TrunkError
from tests.strategies.helpers import CUT, HIDDEN, H, engine_for, largest_difference, tiny_model

ONES = torch.ones_like(H)
FIRST_ENDS = {"top.w": torch.zeros(3)}


def cohort_of(
    names: str, trunk: Callable[[], torch.nn.Module], **train: Any
) -> tuple[TrunkEngine, dict[str, Session]]:
    values = {"strategy": "merged", "optimizer": "sgd", "lr": 0.1, "accumulate": 2, **train}
    engine = engine_for(trunk(), TrainConfig(**values), timeout=20.0)
    engine.policy.start_ends(FIRST_ENDS)
    engine.open_round(1, 1, training=True, cohort=len(names))
    return engine, {name: engine.open(name, client=name, steps=2) for name in names}


class Bare(torch.nn.Module):
    """Nothing brings large numbers back into range here."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, h_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        return h_BTD + self.inner(h_BTD)


def bare() -> torch.nn.Module:
    torch.manual_seed(0)
    return Bare()


def llama() -> torch.nn.Module:
    return split(tiny_model(), CUT).trunk


def work(session: Session, bad: dict[str, float], step: int = 0) -> None:
    """A step of two micro-batches, with these numbers in place of honest ones."""
    try:
        for micro in range(2):
            session.compute(step, micro, H * bad.get("activations", 1.0), None)
        for micro in range(2):
            grad = ONES * bad.get("gradient", 0.1)
            session.backward(step, micro, grad, last=micro == 1, tokens=20)
        ends = {name: value + bad.get("ends", 1.0) for name, value in FIRST_ENDS.items()}
        session.apply(
            step,
            client_square_norm=bad.get("norm", 1.0),
            tokens=20,
            gradients=ends if session._lane.bench.train.sync == "step" else {},
        )
    except TrunkError:
        session.close()  # as the service does
        raise


def together(sessions: dict[str, Session], bad: dict[str, float]) -> dict[str, TrunkError | None]:
    """All take a step, `b` with the bad numbers; the error of each."""
    with ThreadPoolExecutor(len(sessions)) as pool:
        done = {
            name: pool.submit(work, session, bad if name == "b" else {})
            for name, session in sessions.items()
        }
        return {name: future.exception(20) for name, future in done.items()}  # type: ignore[misc]


HUGE = [
    {"activations": 3e38},
    {"gradient": 3e38},
    {"norm": 3e38},
    {"norm": 1.7e308},
    {"activations": 1e15},
    # Within bounds one by one, beyond them where they meet: found by what they do to the sum.
    {"activations": 1e11, "gradient": 1e11},
    {"gradient": 1e12},
]


@pytest.mark.parametrize("trunk", [bare, llama])
@pytest.mark.parametrize("bad", HUGE, ids=str)
def test_the_client_that_sent_them_is_dropped_and_the_others_step_goes_on(
    bad: dict[str, float],
    trunk: Callable[[], torch.nn.Module],
) -> None:
    engine, sessions = cohort_of("abc", trunk)
    first = trunk()

    errors = together(sessions, bad)

    assert errors["a"] is errors["c"] is None
    assert errors["b"] is not None
    assert errors["b"].kind == "not-finite"
    assert all(torch.isfinite(p).all() for p in engine.trunk.parameters())
    moved = largest_difference(engine.trunk, first)
    assert 1e-6 < moved < 10
    rest = {name: sessions[name] for name in "ac"}
    assert [rest[name].applied for name in "ac"] == [1, 1]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda session: work(session, {}, step=1), rest.values()))
    assert engine.in_flight.bytes == 0


def test_what_is_left_is_the_step_of_those_who_are_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The gradient is built again without the one whose share overflowed, to the rounding."""
    engine, sessions = cohort_of("abc", bare, clip=1.0)
    alone, honest = cohort_of("ac", bare, clip=1.0)

    with caplog.at_level(logging.WARNING):
        errors = together(sessions, {"activations": 1e11, "gradient": 1e11})
    assert together(honest, {}) == {"a": None, "c": None}

    assert [name for name, error in errors.items() if error] == ["b"]
    assert "merged: client b is left out: this client's share of the trunk's" in caplog.text
    assert largest_difference(engine.trunk, alone.trunk) < 1e-6


@pytest.mark.parametrize("when", ["between its backwards", "before its step", "refused its norm"])
def test_a_step_is_that_of_those_who_take_it(when: str) -> None:
    """What one who left had given stayed in the trunk's step, weighed as if it were whole."""

    def leaves(session: Session) -> None:
        grad = 70 * ONES * torch.randn(H.shape, generator=torch.Generator().manual_seed(1))
        for micro in range(2):
            session.compute(0, micro, H + 1, None)
        session.backward(0, 0, grad, last=False, tokens=20)
        if when != "between its backwards":
            session.backward(0, 1, grad, last=True, tokens=20)
        if when == "refused its norm":
            with pytest.raises(TrunkError, match="square norm"):
                session.apply(0, client_square_norm=1e300, tokens=20)
        session.close()

    engine, sessions = cohort_of("abc", bare, clip=0.0)
    alone, honest = cohort_of("ac", bare, clip=0.0)

    with ThreadPoolExecutor(3) as pool:
        gone = pool.submit(leaves, sessions.pop("b"))
        stayed = [pool.submit(work, session, {}) for session in sessions.values()]
        assert [each.result(20) for each in (gone, *stayed)] == [None] * 3
    assert together(honest, {}) == {"a": None, "c": None}

    assert largest_difference(engine.trunk, alone.trunk) < 1e-6
    assert largest_difference(engine.trunk, bare()) > 1e-3


def test_dropout_is_the_same_when_a_step_is_built_again() -> None:
    def gpt2() -> torch.nn.Module:
        return split(tiny_model("gpt2", resid_pdrop=0.5), CUT).trunk

    engine, sessions = cohort_of("ab", gpt2)
    square = {}
    for name, session in sessions.items():
        if name == "a":
            sessions["b"].leave()
            session.compute(0, 0, H, None)
            _, square["as it ran"] = session.backward(0, 0, ONES, last=True, tokens=10)
    group = engine.policy._group  # type: ignore[attr-defined]
    square["again"] = group._again(group._tokens.keys())

    assert square["again"] == pytest.approx(square["as it ran"], rel=1e-6)


@pytest.mark.parametrize("bad", [{"ends": 3e38}, {"ends": LARGEST * 2}], ids=str)
def test_the_ends_common_step_is_safe_too(bad: dict[str, float]) -> None:
    engine, sessions = cohort_of("abc", bare, sync="step")

    errors = together(sessions, bad)

    assert [name for name, error in errors.items() if error] == ["b"]
    assert all(torch.isfinite(value).all() for value in engine.policy.ends().values())


def test_tokens_are_the_same_over_a_steps_micro_batches() -> None:
    _, sessions = cohort_of("a", bare)
    session = sessions["a"]
    for micro in range(2):
        session.compute(0, micro, H, None)
    session.backward(0, 0, ONES, last=False, tokens=20)
    with pytest.raises(TrunkError, match="comes with 19 tokens, the step began with 20"):
        session.backward(0, 1, ONES, last=True, tokens=19)


def test_one_absurd_announcement_does_not_stretch_everybodys_schedule() -> None:
    lr = {}
    for steps in (2, 10**6):
        engine, _ = cohort_of("", bare, schedule="linear")
        sessions = [
            engine.open(n, client=n, steps=s) for n, s in (("a", 2), ("b", 2), ("c", steps))
        ]
        sessions[2].leave()
        for step in range(2):
            with ThreadPoolExecutor(2) as pool:
                results = pool.map(lambda s, step=step: _one(s, step), sessions[:2])
                lr[steps] = max(result.lr for result in results)

    assert lr[2] == pytest.approx(0.05)
    assert lr[10**6] == pytest.approx(0.1 * (1 - 1 / 32))


def _one(session: Session, step: int) -> Any:
    session.compute(step, 0, H, None)
    session.backward(step, 0, ONES, last=True, tokens=10)
    return session.apply(step, client_square_norm=1.0, tokens=10)


def test_announced_steps_are_those_of_the_settings() -> None:
    engine = engine_for(bare(), TrainConfig(local_steps=3))
    engine.open_round(1, 1, training=True)
    assert engine.open("a", steps=3).steps == 3
    with pytest.raises(TrunkError, match="announces 4 optimizer steps; train.local_steps=3"):
        engine.open("b", steps=4)
    engine = engine_for(bare(), TrainConfig())
    engine.open_round(1, 1, training=True)
    with pytest.raises(TrunkError, match="announces 1048577 optimizer steps; at most"):
        engine.open("b", steps=2**20 + 1)


@pytest.mark.parametrize("strategy", ["splitfed-v1", "splitfed-v2"])
@pytest.mark.parametrize(
    "bad",
    [
        {"activations": 1e30},
        {"gradient": 1e30},
        {"norm": 1e30},
        # Within bounds one by one: the trunk's own gradient is beyond them, or not finite.
        {"activations": 1e11, "gradient": 1e11},
        {"activations": float("nan")},
    ],
    ids=str,
)
def test_under_every_policy_they_cost_their_sender_alone(
    bad: dict[str, float], strategy: str
) -> None:
    """Under splitfed-v2 one step of 1e30, unclipped, was the end of everybody's trunk."""
    engine, sessions = cohort_of("abc", bare, strategy=strategy, clip=0.0)
    alone, honest = cohort_of("ac", bare, strategy=strategy, clip=0.0)

    work(sessions["a"], {})
    with pytest.raises(TrunkError) as refused:
        work(sessions["b"], bad)
    work(sessions["c"], {})
    for session in honest.values():
        work(session, {})

    assert refused.value.kind == "not-finite"
    assert [sessions[name].applied for name in "abc"] == [1, 0, 1]
    assert largest_difference(engine.trunk, alone.trunk) == 0.0
    replicas, _ = engine.collect("ac")
    want, _ = alone.collect("ac")
    assert all(torch.equal(t, want[c][n]) for c, own in replicas.items() for n, t in own.items())


@pytest.mark.parametrize("strategy", ["splitfed-v1", "splitfed-v2", "merged"])
def test_in_evaluation_too(strategy: str) -> None:
    engine = engine_for(bare(), TrainConfig(strategy=strategy))
    engine.open_round(1, 1, training=False)
    with pytest.raises(TrunkError, match="activations of step 0 holds values beyond"):
        engine.open("a", client="a").compute(0, 0, H * 1e30, None)


@pytest.mark.parametrize("sync", ["round", "step"])
def test_one_clients_gradient_is_cut_to_a_multiple_of_the_median(sync: str) -> None:
    """What is large, but not huge, takes the whole of a step's direction, clipped or not."""
    settings = {"sync": sync, "accumulate": 2, "clip": 0.0}
    first = bare()
    moved, told = {}, {}
    for most, gradient in ((0.0, 0.1), (0.0, 1e4), (2.0, 0.1), (2.0, 1e4)):
        engine, sessions = cohort_of("abc", bare, outlier_clip=most, **settings)
        bad = {"gradient": gradient, "ends": 10 * gradient}
        assert together(sessions, bad) == {"a": None, "b": None, "c": None}
        moved[most, gradient] = largest_difference(engine.trunk, first)
        ends = [float(tensor.abs().max()) for tensor in engine.policy.ends().values()]
        told[most, gradient] = (engine.policy.anomalies(), ends)

    assert moved[2.0, 0.1] == moved[0.0, 0.1]
    assert told[2.0, 0.1] == told[0.0, 0.1]
    assert moved[0.0, 1e4] > 1000 * moved[0.0, 0.1]
    assert moved[2.0, 1e4] == pytest.approx(
        moved[0.0, 0.1] * 4 / 3, rel=1e-3
    )  # 1, 2, 1 for 1, 1, 1
    odd, ends = told[2.0, 1e4]
    assert list(odd) == ["b"]
    assert odd["b"]["clipped"] == 1
    assert odd["b"]["clipped_times"] == pytest.approx(1e5, rel=1e-3)
    if sync == "step":
        assert ends[0] == pytest.approx(told[0.0, 0.1][1][0] * 4 / 3, rel=1e-3)


def test_a_client_that_comes_alone_is_held_to_the_last_median() -> None:
    """Else whoever sends one micro-batch more than the others does so unwatched."""
    engine, sessions = cohort_of("abc", bare, outlier_clip=2.0, accumulate=2, clip=0.0)

    def more(session: Session) -> None:
        for micro in range(2):
            session.compute(0, micro, H, None)
        session.backward(0, 0, ONES * 0.1, last=False, tokens=20)
        session.backward(0, 1, ONES * 1e4, last=True, tokens=20)
        session.apply(0, client_square_norm=1.0, tokens=20)

    def less(session: Session) -> None:
        session.compute(0, 0, H, None)
        session.backward(0, 0, ONES * 0.1, last=True, tokens=10)
        session.apply(0, client_square_norm=1.0, tokens=10)

    with ThreadPoolExecutor(3) as pool:
        works = {"a": less, "b": more, "c": less}
        done = [pool.submit(works[name], session) for name, session in sessions.items()]
        assert [each.result(20) for each in done] == [None] * 3
    assert engine.policy.anomalies()["b"]["clipped_times"] == pytest.approx(2**0.5 * 1e5, rel=1e-3)
