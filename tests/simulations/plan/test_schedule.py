"""When the pieces of a step happen, in cases that are counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulations.plan.schedule import Legs, round_trips, step_time

NOTHING = Legs(
    rising=0.0, across=0.0, back=0.0, forward=0.0, backward=0.0, client_step=0.0, trunk_step=0.0
)


@pytest.mark.parametrize(
    "micros, window, trips",
    [
        (1, 1, 3),  # forward, backward, optimizer step
        (4, 1, 9),
        (1, 2, 2),  # the optimizer step goes with the next forward
        (4, 4, 2),
        (4, 2, 3),  # a backward travels with the forward after the next
    ],
)
def test_round_trips(micros: int, window: int, trips: int) -> None:
    assert round_trips(micros, window) == trips
    assert step_time(replace(NOTHING, latency=0.5), micros, window) == pytest.approx(trips)


def test_client_and_trunk_work_at_once() -> None:
    """A forward of the trunk, then the top: the trunk goes on with the next micro-batch."""
    legs = replace(NOTHING, forward=1.0, across=1.0)
    assert step_time(legs, 4, 1) == pytest.approx(8.0)
    assert step_time(legs, 4, 4) == pytest.approx(5.0)


def test_what_has_one_worker_takes_its_time() -> None:
    for legs in (
        replace(NOTHING, forward=1.0, backward=2.0),
        replace(NOTHING, rising=1.0, across=1.5, back=0.5),
        replace(NOTHING, h1=1.0, grad_h2=2.0),
    ):
        for window in (1, 2, 4):
            assert step_time(legs, 4, window) == pytest.approx(12.0)


def test_both_ways_are_used_at_once() -> None:
    legs = replace(NOTHING, h1=1.0, h2=1.0, grad_h2=1.0, grad_h1=1.0)
    assert step_time(legs, 4, 1) == pytest.approx(16.0)
    assert step_time(legs, 4, 4) < 12.0
