"""A soak tells growth from none."""

from __future__ import annotations

import pytest

from simulations.bench.soak import FLAT, Sample, bench_soak, trend
from strategies.engine.engine import TrunkEngine

pytestmark = pytest.mark.usefixtures("one_thread")


def _leak(engine: TrunkEngine) -> None:
    """Keep 64 KiB for every micro-batch."""
    take, kept = engine.in_flight.take, []

    def leaking(count: int) -> None:
        kept.append(bytearray(b"x" * 2**16))
        take(count)

    engine.in_flight.take = leaking  # type: ignore[method-assign]


def test_a_short_soak_reports_and_leaves_nothing() -> None:
    result = bench_soak(60)

    assert result["steps"] == 60
    assert result["breaks"] == 1
    assert result["connections"] == 2
    assert result["samples"] == 2
    assert result["left_after_good_byes"] == result["sessions_alive"] == result["exit_code"] == 0
    assert result["clean"]
    for process in ("server", "client"):
        assert 50 < result[process]["first_mib"] <= result[process]["highest_mib"] < 4000


@pytest.mark.slow
def test_a_leak_is_seen() -> None:
    result = bench_soak(400, spoil=_leak)

    assert not result["flat"]
    assert 50 < result["server"]["mib_per_1000_steps"] < 90


@pytest.mark.slow
def test_two_thousand_steps_are_flat() -> None:
    assert bench_soak(2000)["flat"]


@pytest.mark.parametrize(("growth", "flat"), [(0.0, True), (0.001, True), (0.01, False)])
def test_the_slope_is_that_of_the_later_samples(growth: float, flat: bool) -> None:
    samples = [
        Sample(step=step, server=300 + growth * step - (50 if step < 100 else 0), client=200.0)
        for step in range(50, 1001, 50)
    ]
    row = trend(samples, "server")
    assert row["mib_per_1000_steps"] == pytest.approx(1000 * growth)
    assert (row["mib_per_1000_steps"] < FLAT) is flat
    assert trend(samples, "client")["mib_per_1000_steps"] == pytest.approx(0, abs=1e-6)
