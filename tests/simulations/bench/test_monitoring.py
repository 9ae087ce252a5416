"""The bench of monitoring: both trunks train, and one tells of each step."""

from __future__ import annotations

import pytest

from simulations.bench.monitoring import bench_monitoring


@pytest.mark.slow
def test_a_short_bench_reports() -> None:
    found = bench_monitoring(steps=10, warmup=1)
    assert found["steps"] == 10
    assert found["cost_low"] <= found["cost"] <= found["cost_high"]
    assert 0 < found["waited_seconds_per_step"] < found["plain_seconds"]
