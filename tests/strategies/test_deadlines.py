"""Deadlines follow from two settings, in an order that nothing else may upset."""

from __future__ import annotations

import pytest

from strategies.deadlines import gather, keepalive, repeat, silence, turn


@pytest.mark.parametrize("timeout", [0.5, 2.0, 120.0, 86400.0])
def test_each_waits_less_long_than_who_waits_for_it(timeout: float) -> None:
    order = [repeat(timeout), gather(turn(timeout)), silence(timeout), turn(timeout), timeout]

    assert order == sorted(order)
    assert len(set(order)) == len(order)


@pytest.mark.parametrize("grace", [4.0, 30.0, 3600.0])
def test_a_dead_connection_is_known_for_broken_within_the_grace(grace: float) -> None:
    """It is tried after so long, and may take as long to answer."""
    assert 2 * keepalive(grace) <= grace / 2


def test_connections_are_not_tried_more_often_than_once_a_second() -> None:
    assert keepalive(0.1) == 1.0
