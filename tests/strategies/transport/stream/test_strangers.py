"""Whoever has no token reaches nothing, whatever the connection's metadata says."""

from __future__ import annotations

import gc
import random
import time
import weakref

import grpc
import pytest
import torch

from conf.schema import TrainConfig
from simulations.disturb.sessions import OneLayer
from simulations.equality.fold import fold
from strategies.engine.engine import TrunkEngine
from strategies.transport import tickets
from strategies.transport.link import Link, StepCounters
from strategies.transport.stream.options import (
    CONNECTION_KEY,
    METHOD,
    SESSION_KEY,
    STEPS_KEY,
    TOKEN_KEY,
)
from tests.strategies.helpers import HIDDEN, admit, back, connect, forward, served

TRIES = 200
KEYS = (SESSION_KEY, TOKEN_KEY, CONNECTION_KEY, STEPS_KEY)
NUMBERS = ("0", "-1", "1.0", "1e3", "٣", "²", "1" * 9, "1" * 40, "0x1", " 1", "nan", "")
REFUSED = (
    grpc.StatusCode.UNAUTHENTICATED,  # ours
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # gRPC's own: metadata that is too large
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
)

H = torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(0))


def strange(chance: random.Random, right: dict[str, str]) -> list[tuple[str, str | bytes]]:
    """Metadata of which something is wrong; the token always is."""
    made: list[tuple[str, str | bytes]] = []
    for key in KEYS:
        way = chance.random()
        if way < 0.4 and key != TOKEN_KEY:
            made.append((key, right[key]))
        elif way < 0.8:
            made += [(key, _value(chance)) for _ in range(chance.choice((1, 1, 1, 2, 5)))]
    made += [("graft-x-bin", chance.randbytes(9))] if chance.random() < 0.2 else []
    made += [(f"x-{n}", "y") for n in range(50)] if chance.random() < 0.1 else []
    chance.shuffle(made)
    return made


def _value(chance: random.Random) -> str:
    return chance.choice(
        (
            chance.choice(NUMBERS),
            "f" * 64,
            "f" * 63 + "é",
            "n" * chance.choice((1, 2000, 5000, 20_000)),
            "".join(chr(chance.randrange(32, 127)) for _ in range(20)),
        )
    )


def test_strangers_reach_nothing_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TrunkEngine(OneLayer(HIDDEN), hidden_size=HIDDEN, train=TrainConfig())
    engine.open_round(1, 1, training=True)
    opened: list[str] = []
    open_session = engine.open

    def noted(key: str, **rest: object) -> object:
        opened.append(key)
        return open_session(key, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "open", noted)
    chance, codes = random.Random(0), []
    with served(engine) as service:
        admit(service, "waits")  # its ticket is out, its client has not come
        link = connect(service, "a", 7)
        channel = grpc.insecure_channel(service.address)
        for number in range(TRIES):
            right = {
                SESSION_KEY: chance.choice(("a", "waits", "none")),
                CONNECTION_KEY: "2",
                STEPS_KEY: "3",
                TOKEN_KEY: "",
            }
            codes.append(_try(channel, strange(chance, right)))
            if number % 30 == 0:  # 7 times
                _step(link, number // 30)
        link.close()
        channel.close()
        deadline = time.monotonic() + 5
        while service.sessions() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert service.sessions() == 0

    assert opened == ["a"]
    assert set(codes) <= {*REFUSED, None}
    assert codes.count(grpc.StatusCode.UNAUTHENTICATED) > TRIES / 3
    assert link.connections == 1


def _try(channel: grpc.Channel, metadata: list[tuple[str, str | bytes]]) -> grpc.StatusCode | None:
    """How a stranger is refused; None if gRPC does not even send it."""
    try:
        call = channel.stream_stream(METHOD)(iter([b"x"]), metadata=metadata, timeout=10)
        answers = list(call)
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined]
    except (ValueError, TypeError):
        return None
    raise AssertionError(f"{metadata} was answered with {answers}")


def _step(link: Link, step: int) -> None:
    h_BTD = forward(link, step, 0, H, None)
    back(link, step, 0, torch.ones_like(h_BTD), last=True)
    link.apply(step, StepCounters(client_square_norm=0.0, tokens=3))
    link.applied()


def test_the_right_token_of_another_connection_is_refused_too() -> None:
    engine = TrunkEngine(OneLayer(HIDDEN), hidden_size=HIDDEN, train=TrainConfig())
    engine.open_round(1, 1, training=True)
    with served(engine) as service:
        link = connect(service, "a", 1)
        channel = grpc.insecure_channel(service.address)
        for number, token_of in (("1", 1), ("0", 0), ("3", 2), ("2" * 12, 2)):
            metadata = [
                (SESSION_KEY, "a"),
                (CONNECTION_KEY, number),
                (TOKEN_KEY, tickets.token(link._connection._secret, token_of)),
                (STEPS_KEY, "1"),
            ]
            assert _try(channel, metadata) == grpc.StatusCode.UNAUTHENTICATED
        _step(link, 0)
        link.close()
        channel.close()


def test_a_session_takes_no_memory_after_its_round() -> None:
    """The thread that looks for lost clients held the last seat it had seen, replica and all."""
    engine = TrunkEngine(OneLayer(HIDDEN), hidden_size=HIDDEN, train=TrainConfig())
    engine.open_round(1, 1, training=True)
    with served(engine, timeout=1.0) as service:
        link = connect(service, "a", 1)
        session = weakref.ref(engine._sessions["a"])
        time.sleep(0.3)  # it is looked at meanwhile
        _step(link, 0)
        link.close()
        service.end_round()
        fold(engine, {"a": 1.0})

        deadline = time.monotonic() + 5
        while session() is not None and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.05)
        assert session() is None
