"""Many sessions at once cost no error, and leave none."""

from __future__ import annotations

import pytest

from simulations.bench.load import bench_load
from strategies.transport.stream.link import GrpcLink

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8}
pytestmark = pytest.mark.usefixtures("one_thread")


def _check(result: dict, sessions: int) -> None:
    assert result["first_errors"] == []
    assert result["clean"]
    assert result["exit_code"] == 0
    assert result["all sessions open"]["sessions"] == sessions
    left = result["all have left"]
    assert left["sessions"] == left["in_flight_bytes"] == result["sessions_alive"] == 0


def test_eight_sessions() -> None:
    _check(bench_load(8, 2, **SMALL), 8)


def test_a_session_without_a_good_bye_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[GrpcLink] = []
    monkeypatch.setattr(GrpcLink, "close", lambda link: kept.append(link))
    monkeypatch.setattr("simulations.bench.trunk_process.LEAVE_SECONDS", 0.3)
    result = bench_load(2, 1, **SMALL)
    for link in kept:
        link.abort()

    assert result["errors"] == 0
    assert result["all have left"]["sessions"] == 2
    assert not result["clean"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["splitfed-v1", "splitfed-v2", "merged"])
def test_sixty_four_sessions(strategy: str) -> None:
    _check(bench_load(64, 5, strategy), 64)
