"""Plans against real steps between two processes: memory, bytes and seconds."""

from __future__ import annotations

import pytest

from simulations.bench.plan import BOUNDS, CASES, bench_plan


@pytest.mark.slow
def test_plans_come_true() -> None:
    result = bench_plan(steps=5)
    assert len(result["cases"]) == len(CASES) >= 5
    assert result["within"], result["worst"]
    assert BOUNDS == {"memory": 0.1, "bytes": 0.1, "step": 0.2}
