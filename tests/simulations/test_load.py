"""Many sessions at once cost no error, and leave none."""

from __future__ import annotations

import pytest

from simulations.load import bench_load

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8}
pytestmark = pytest.mark.usefixtures("one_thread")


def _check(result: dict, sessions: int) -> None:
    assert result["first_errors"] == []
    assert result["clean"]
    assert result["exit_code"] == 0
    assert result["all sessions open"]["sessions"] == sessions
    assert result["after"]["sessions"] == result["after"]["in_flight_bytes"] == 0


def test_eight_sessions() -> None:
    _check(bench_load(8, 2, **SMALL), 8)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["splitfed-v1", "splitfed-v2", "merged"])
def test_sixty_four_sessions(strategy: str) -> None:
    _check(bench_load(64, 5, strategy), 64)
