"""Invariant 8: whatever happens to frames while several are under way, not a bit changes, and no
more is sent again than has to be."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from conf.schema import TrainConfig
from flower_app.client import streamed
from models import split
from simulations.disturb.faults import DOWN, KINDS, UP, Faults, Schedule, draw_schedule
from simulations.equality.fold import fold
from strategies.transport.frames import read_client_frame
from strategies.transport.stream.channel import Stream
from strategies.transport.stream.link import GrpcLink
from tests.strategies.helpers import (
    CUT,
    NODE_KEY,
    admit,
    engine_for,
    largest_difference,
    link_config,
    place,
    random_batch,
    random_steps,
    served,
    tiny_model,
)

TRAIN = TrainConfig(lr=1e-2, accumulate=4)
STEPS = 2
FRAMES = STEPS * 9
"""Four forwards, four backwards and the step's end."""


def trained(
    schedule: Schedule, window: int = 4, timeout: float = 2.0
) -> tuple[torch.nn.Module, list[float], int]:
    """The model after a round whose link meets these faults; its losses, and its streams."""
    model = tiny_model("gpt2", resid_pdrop=0.2)
    parts = split(model, CUT)
    engine = engine_for(parts.trunk, TRAIN)
    engine.open_round(1, 1, training=True)
    steps = random_steps(STEPS, seed=5, accumulate=4)
    quick = {"timeout": timeout, "grace": 1.0}
    faults = Faults(schedule, delay=0.4)
    with served(engine, **quick) as service:
        config = link_config(**quick)
        link = GrpcLink(
            admit(service, "a"), NODE_KEY, steps=STEPS, config=config, interceptors=[faults]
        )
        outcome = streamed.train(
            parts.bottom, parts.top, link, steps, STEPS, TRAIN, place("a"), window=window
        )
        link.close()
        assert engine.in_flight.bytes == 0
        assert sum(faults.met.values()) == len(schedule), "a fault was not met"
    fold(engine, {"a": 1.0})
    return model, outcome.losses, link.connections


_kept: list[tuple[torch.nn.Module, list[float], int]] = []


@pytest.fixture
def alone(one_thread: None) -> tuple[torch.nn.Module, list[float], int]:
    if not _kept:
        _kept.append(trained({}, window=1))
    return _kept[0]


# Up: 0 to 3 Compute, 4 to 7 Backward, 8 Apply, and the next step; down: 0 Opened, then the answers.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frame", [(UP, 1), (UP, 4), (UP, 8), (DOWN, 2), (DOWN, 9)])
def test_one_fault_among_several_frames_changes_no_bit(
    kind: str, frame: tuple[str, int], alone: tuple[torch.nn.Module, list[float], int]
) -> None:
    model, losses, streams = trained({frame: kind})

    assert losses == alone[1]
    assert largest_difference(model, alone[0]) == 0
    assert streams == (2 if kind == "break" else 1)


@pytest.mark.parametrize("seed", range(4))
def test_many_faults_change_no_bit(
    seed: int, alone: tuple[torch.nn.Module, list[float], int]
) -> None:
    model, losses, _ = trained(draw_schedule(seed, frames=16, rate=0.3))

    assert losses == alone[1]
    assert largest_difference(model, alone[0]) == 0


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every frame that links send."""
    found: list[bytes] = []
    send = Stream.send
    monkeypatch.setattr(Stream, "send", lambda self, raw: (found.append(raw), send(self, raw))[1])
    return found


@pytest.mark.parametrize(
    ("schedule", "least", "most"),
    [
        ({(UP, 0): "lose"}, 4, 4),
        ({(UP, 2): "lose"}, 2, 4),  # two backwards may be under way by then
        ({(UP, 0): "corrupt"}, 4, 4),
        ({(UP, 3): "corrupt"}, 1, 4),
        # 0 to 3 leave, 0 is lost; 4 to 7 are the same again, and the first of them is lost, too.
        ({(UP, 0): "lose", (UP, 4): "lose"}, 8, 8),
        ({(UP, 0): "lose", (UP, 1): "lose", (UP, 2): "lose"}, 4, 4),
        ({(UP, 2): "duplicate"}, 0, 0),
    ],
)
def test_a_gap_is_filled_once_and_no_storm_follows(
    schedule: Schedule, least: int, most: int, sent: list[bytes], alone: object
) -> None:
    """With time enough that nothing is asked for again because it was long in coming."""
    sent.clear()
    trained(schedule, timeout=120.0)

    again = len(sent) - FRAMES - 1  # and the good-bye
    assert least <= again <= most
    numbers = [read_client_frame(raw).head.number for raw in sent]
    if least == 4:  # all four are gone back to before anything else leaves
        assert numbers[:8] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert max(len(list(group)) for _, group in groupby(numbers)) == 1
    by_number: dict[int, set[bytes]] = {}
    for number, raw in zip(numbers, sent, strict=True):
        by_number.setdefault(number, set()).add(raw)
    assert all(len(raws) == 1 for raws in by_number.values()), "sent again as other bytes"


def test_evaluation_survives_with_several_batches_under_way(one_thread: None) -> None:
    parts, batches = split(tiny_model(), CUT), [random_batch(seed) for seed in range(7)]
    found = []
    for schedule in ({}, {(UP, 1): "lose", (DOWN, 3): "lose", (UP, 6): "break"}):
        engine = engine_for(parts.trunk, TRAIN)
        engine.open_round(1, 1, training=False)
        faults, quick = Faults(schedule), {"timeout": 2.0, "grace": 1.0}
        with served(engine, **quick) as service:
            link = GrpcLink(
                admit(service, "a"),
                NODE_KEY,
                steps=0,
                config=link_config(**quick),
                interceptors=[faults],
            )
            done = streamed.evaluate(parts.bottom, parts.top, link, batches, TRAIN, window=3)
            link.close()
        assert sum(faults.met.values()) == len(schedule)
        found.append((done.loss, done.tokens))

    assert found[0] == found[1]
