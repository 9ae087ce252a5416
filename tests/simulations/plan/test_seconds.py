"""A step's seconds, added up by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models.cut import Cut
from simulations.plan.frames import StepFrames
from simulations.plan.seconds import Network, step_seconds, whole_seconds
from simulations.plan.speed import Piece, Pieces

ENDS = Piece(forward=0.1, backward=0.2, step=0.05, top=0.7)
CLIENT = Pieces(ends=ENDS, blocks=[Piece(forward=1.0, backward=2.0, step=0.5)] * 4)
SERVER = Pieces(ends=ENDS, blocks=[Piece(forward=0.1, backward=0.2, step=0.3)] * 4)
FRAMES = StepFrames(
    up=2_000_000,
    down=1_000_000,
    crossings=(1_000_000, 500_000, 1_000_000, 500_000),
    largest=1,
    seconds=0.01,
)
NETWORK = Network(bandwidth=8e6, latency=0.5)


def _step(clients: int = 1, strategy: str = "splitfed-v1", micros: int = 1) -> dict[str, float]:
    found = step_seconds(
        Cut(1, 1),
        CLIENT,
        SERVER,
        FRAMES,
        NETWORK,
        clients=clients,
        strategy=strategy,
        micros=micros,
    )
    return vars(found)


def test_a_step_of_one_client() -> None:
    found = _step()
    # Bottom, top and the ends around them: 0.1 + 1, 0.7 + 3, 0.2 + 2; their optimizer: 0.05 + 1.
    assert found["client"] == pytest.approx(7.0 + 1.05)
    assert found["server"] == pytest.approx(2 * 0.3 + 2 * 0.3)
    assert found["wire"] == pytest.approx(3.0)
    assert found["latency"] == pytest.approx(1.5)
    # The client's optimizer (1.05) and the trunk's with a round trip (1.1) run at the same time.
    assert found["total"] == pytest.approx(7.0 + 0.6 + 3.0 + 0.01 + 2 * 0.5 + 1.1)


def test_clients_that_share_a_trunk() -> None:
    alone = _step()["total"]
    # Replicas: the trunk is idle long enough for nine others; of twenty, it is what all wait for.
    assert _step(10)["total"] == pytest.approx(alone)
    assert _step(20)["total"] == pytest.approx(20 * 1.2)
    # Turns: only the bottom and the way of h1 (1.1 + 1.0 + 0.25) are outside a turn.
    assert _step(3, "splitfed-v2")["total"] == pytest.approx(3 * (alone - 2.35))
    # One batch of all: it takes the trunk as long as all of theirs.
    assert _step(3, "merged")["total"] == pytest.approx(alone + 2 * 0.6)


def test_micro_batches_repeat_all_but_the_optimizer() -> None:
    one, two = _step(), _step(micros=2)
    assert two["client"] - one["client"] == pytest.approx(7.0)
    assert two["server"] - one["server"] == pytest.approx(0.6)


def test_a_call_of_the_trunk_counts_once_however_many_blocks_there_are() -> None:
    call = Piece(forward=0.01, backward=0.02, step=0.04)
    server = replace(SERVER, call=call)
    args = (FRAMES, NETWORK)
    options = {"clients": 1, "strategy": "splitfed-v1", "micros": 2}
    for cut in (Cut(1, 1), Cut(1, 2)):
        plain = step_seconds(cut, CLIENT, SERVER, *args, **options)  # type: ignore[arg-type]
        called = step_seconds(cut, CLIENT, server, *args, **options)  # type: ignore[arg-type]
        assert called.server - plain.server == pytest.approx(2 * 0.03 + 0.04)


def test_the_unsplit_step_has_every_piece() -> None:
    assert whole_seconds(CLIENT, 2) == pytest.approx(2 * (1.0 + 12.0) + 0.05 + 2.0)
