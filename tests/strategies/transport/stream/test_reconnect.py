"""Row 17: whatever the network does to a session, each of its steps is taken once, or it ends in
words within a deadline."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from conf.schema import TrainConfig
from flower_app.client import streamed
from models import split
from simulations.disturb.faults import DOWN, KINDS, UP, Faults, Schedule, draw_schedule
from simulations.equality.fold import fold
from simulations.equality.local_link import LocalLink
from strategies.errors import TrunkError
from strategies.transport.codec.registry import find_codec
from strategies.transport.conversation import MAX_REPEATS
from strategies.transport.frames import read_client_frame
from strategies.transport.stream.channel import Stream
from strategies.transport.stream.link import GrpcLink
from strategies.transport.stream.service import TrunkService
from tests.strategies.helpers import (
    CUT,
    NODE_KEY,
    H,
    admit,
    back,
    compute_frame,
    connect,
    engine_for,
    forward,
    get_gradients,
    largest_difference,
    link_config,
    open_engine,
    place,
    random_steps,
    served,
    tiny_model,
)

QUICK = {"timeout": 2.0, "grace": 1.0}
TRAIN = TrainConfig(optimizer="adamw", lr=1e-2, accumulate=2)
STEPS = 3


def trained(schedule: Schedule | None) -> tuple[torch.nn.Module, list[float], int]:
    """The model after a round whose link meets these faults (None: no wire at all); its losses, and
    how many streams it took."""
    model = tiny_model("gpt2", resid_pdrop=0.2)
    parts = split(model, CUT)
    engine = engine_for(parts.trunk, TRAIN)
    engine.open_round(1, 1, training=True)
    steps = random_steps(STEPS, seed=5, accumulate=2)
    streams = 0
    with served(engine, **QUICK) as service:
        if schedule is None:
            link = LocalLink(engine.open("a", client="a", steps=STEPS))
        else:
            faults = Faults(schedule, delay=0.4)
            config = link_config(**QUICK)
            link = GrpcLink(
                admit(service, "a"), NODE_KEY, steps=STEPS, config=config, interceptors=[faults]
            )  # type: ignore[assignment]
        outcome = streamed.train(parts.bottom, parts.top, link, steps, STEPS, TRAIN, place("a"))
        link.close()
        assert engine.in_flight.bytes == 0
        if schedule is not None:
            assert sum(faults.met.values()) == len(schedule), "a fault was not met"
            streams = link.connections  # type: ignore[attr-defined]
            assert service.sessions() == 0
    fold(engine, {"a": 1.0})
    return model, outcome.losses, streams


_kept: list[tuple[torch.nn.Module, list[float]]] = []


@pytest.fixture
def undisturbed(one_thread: None) -> tuple[torch.nn.Module, list[float]]:
    if not _kept:
        _kept.append(trained(None)[:2])
    return _kept[0]


# Up: 0 Compute, 1 Backward, 2 Compute, 3 Backward, 4 Apply, ...; down: 0 Opened, then the answers.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frame", [(UP, 0), (UP, 3), (UP, 4), (DOWN, 1), (DOWN, 2), (DOWN, 5)])
def test_one_fault_changes_no_bit(
    kind: str, frame: tuple[str, int], undisturbed: tuple[torch.nn.Module, list[float]]
) -> None:
    model, losses, streams = trained({frame: kind})

    assert losses == undisturbed[1]
    assert largest_difference(model, undisturbed[0]) == 0
    assert streams == (2 if kind == "break" else 1)


@pytest.mark.parametrize("kind", ["lose", "break", "corrupt"])
def test_the_good_bye_and_the_greeting_may_be_lost_too(
    kind: str, undisturbed: tuple[torch.nn.Module, list[float]]
) -> None:
    good_bye = STEPS * 5
    model, _, _ = trained({(DOWN, 0): kind, (UP, good_bye): kind})
    assert largest_difference(model, undisturbed[0]) == 0
    model, _, _ = trained({(DOWN, good_bye + 1): kind})
    assert largest_difference(model, undisturbed[0]) == 0


@pytest.mark.parametrize("seed", range(4))
def test_many_faults_change_no_bit(
    seed: int, undisturbed: tuple[torch.nn.Module, list[float]]
) -> None:
    model, losses, _ = trained(draw_schedule(seed, frames=14, rate=0.3))

    assert losses == undisturbed[1]
    assert largest_difference(model, undisturbed[0]) == 0


def test_a_lost_gradient_is_fetched_and_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """GetGradients brings the reply that is long in coming; a `Backward` that was lost is sent
    again, and so is whatever was under way when a stream broke."""
    sent: list[str] = []
    send = Stream.send

    def noted(self: Stream, raw: bytes) -> None:
        sent.append(read_client_frame(raw).kind)
        send(self, raw)

    monkeypatch.setattr(Stream, "send", noted)
    for fault, kind, expected in (
        ((DOWN, 2), "lose", ["compute", "backward", "get_gradients"]),
        ((UP, 1), "lose", ["compute", "backward", "get_gradients", "backward"]),
        ((DOWN, 2), "break", ["compute", "backward", "backward"]),
    ):
        sent.clear()
        with served(open_engine()) as service:  # with time enough that nothing is repeated twice
            faults = Faults({fault: kind})
            link = GrpcLink(
                admit(service, "a"),
                NODE_KEY,
                steps=1,
                config=link_config(timeout=8.0),
                interceptors=[faults],
            )
            forward(link, 0, 0, H, None)
            back(link, 0, 0, torch.ones_like(H), last=True)
            assert sent == expected
            link.abort()


def test_frames_sent_again_are_the_same_bytes_whatever_the_codec(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two are under way as the stream breaks, and no two encodings of a tensor are alike."""
    sent: list[bytes] = []
    send = Stream.send
    codec = find_codec("fp32")
    usual = codec.encode
    monkeypatch.setattr(
        codec, "encode", lambda self, h, *place: usual(self, h + torch.rand(()), *place)
    )
    monkeypatch.setattr(Stream, "send", lambda self, raw: (sent.append(raw), send(self, raw)))
    with served(open_engine(accumulate=2)) as service:
        faults = Faults({(DOWN, 1): "break"})
        link = GrpcLink(
            admit(service, "a"), NODE_KEY, steps=1, config=link_config(), interceptors=[faults]
        )
        link.compute(0, 0, H, None)
        link.compute(0, 1, H, None)
        first, second = link.computed(), link.computed()
        link.abort()

    assert sent[2:4] == sent[:2]
    assert sent[0] != sent[1]
    assert not torch.equal(first, second)


def cut(link: GrpcLink) -> None:
    """Break the link's stream as a network does: without a good-bye."""
    assert link._connection.stream is not None
    link._connection.stream._channel.close()


@pytest.mark.parametrize("strategy", ["splitfed-v1", "splitfed-v2", "merged"])
def test_a_session_keeps_its_graph_for_the_grace_and_no_longer(strategy: str) -> None:
    engine = open_engine(strategy=strategy)
    with served(engine, timeout=6.0, grace=0.8) as service:
        link = connect(service, "a", 2, timeout=6.0, grace=0.8)
        forward(link, 0, 0, H, None)
        cut(link)
        time.sleep(0.3)
        assert service.broken("a") is not None
        assert not engine._sessions["a"]._closed
        back(link, 0, 0, torch.ones_like(H), last=True, tokens=4)  # comes back
        assert service.broken("a") is None
        assert engine.in_flight.bytes > 0

        cut(link)
        deadline = time.monotonic() + 5
        while not engine._sessions["a"]._closed and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine._sessions["a"]._closed
        assert engine.in_flight.bytes == 0
        assert service.broken("a") is not None
        with pytest.raises(TrunkError, match=r"its client stayed away for .* s: given up") as told:
            back(link, 0, 0, torch.ones_like(H), last=True, tokens=4)
        assert told.value.kind == "lost"


def test_one_who_leaves_in_order_is_not_waited_for() -> None:
    engine = open_engine(strategy="splitfed-v2")
    with served(engine) as service:
        leaver = connect(service, "a", 2)
        forward(leaver, 0, 0, H, None)
        started = time.monotonic()
        leaver.abort()
        assert forward(connect(service, "b", 2), 0, 0, H, None).shape == H.shape
        assert time.monotonic() - started < 5, "link.grace is 30 s"


def test_a_new_stream_takes_the_place_of_one_that_the_trunk_believes_alive() -> None:
    """The network swallows packets, and only the client has noticed."""
    engine = open_engine()
    with served(engine) as service:
        link = connect(service, "a", 1)
        forward(link, 0, 0, H, None)
        stuck, link._connection.stream = link._connection.stream, None
        assert stuck is not None
        link._connection.open(5.0)
        with pytest.raises(TrunkError) as ended:  # and its thread serves others
            stuck.receive(5.0)
        assert ended.value.kind == "broken"
        grad, _ = back(link, 0, 0, torch.ones_like(H), last=True)
        assert grad.shape == H.shape
        assert service.sessions() == 1


def test_the_trunks_work_for_a_broken_stream_is_waited_for_not_done_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = open_engine()
    with served(engine) as service:
        link = connect(service, "a", 1)
        working, go_on, runs = threading.Event(), threading.Event(), []
        usual = engine.bench.forward

        def slow(*args: Any) -> torch.Tensor:
            runs.append(1)
            working.set()
            go_on.wait(10)
            return usual(*args)

        monkeypatch.setattr(engine.bench, "forward", slow)
        got: list[torch.Tensor] = []
        client = threading.Thread(target=lambda: got.append(forward(link, 0, 0, H, None)))
        client.start()
        assert working.wait(10)
        cut(link)
        deadline = time.monotonic() + 10
        while link.connections < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        go_on.set()
        client.join(10)

        assert (len(got), len(runs), link.connections) == (1, 1, 2)
        link.abort()


def test_a_trunk_that_died_ends_the_round_in_words_within_the_grace() -> None:
    with served(open_engine(), **QUICK) as service:
        link = connect(service, "a", 1, **QUICK)
        forward(link, 0, 0, H, None)
        service._server.stop(None).wait()

        started = time.monotonic()
        with pytest.raises(TrunkError, match=r"attempts within link.grace=1 s .* resume") as lost:
            back(link, 0, 0, torch.ones_like(H), last=True)
        assert lost.value.kind == "lost"
        assert time.monotonic() - started < 4


def test_a_trunk_that_was_started_anew_knows_the_session_no_more() -> None:
    with served(open_engine(), **QUICK) as service:
        link = connect(service, "a", 1, **QUICK)
        forward(link, 0, 0, H, None)
        address = service.address
    with served(open_engine(), bind=address, **QUICK), pytest.raises(TrunkError) as refused:
        back(link, 0, 0, torch.ones_like(H), last=True)
    assert refused.value.kind == "refused"


def test_attempts_to_connect_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("strategies.transport.stream.connection.time.sleep", pauses.append)
    with served(open_engine()) as service:
        ticket = replace(admit(service, "a"), address="127.0.0.1:1")
    with pytest.raises(TrunkError, match="no trunk answers at 127.0.0.1:1"):
        GrpcLink(ticket, NODE_KEY, steps=1, config=link_config(timeout=0.5))

    ceilings = [min(0.1 * 2**i, 5.0) for i in range(len(pauses))]
    assert len(pauses) > 3
    for pause, ceiling in zip(pauses[:3], ceilings, strict=False):
        assert pause <= ceiling
    assert len({p / c for p, c in zip(pauses[:4], ceilings, strict=False)}) > 1, "no jitter"


@contextmanager
def black_hole() -> Iterator[str]:
    """An address that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_that_swallows_everything_is_given_up() -> None:
    with served(open_engine()) as service, black_hole() as address:
        ticket = replace(admit(service, "a"), address=address)
        started = time.monotonic()
        with pytest.raises(TrunkError, match=r"check that link.advertise .* port is open"):
            GrpcLink(ticket, NODE_KEY, steps=1, config=link_config(timeout=2.0))
        assert time.monotonic() - started < 6


def test_a_session_of_nothing_but_damage_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something on the way changes every frame: bounded, and in words."""
    with served(open_engine()) as service:
        link = connect(service, "a", 1)
        monkeypatch.setattr(
            Stream, "send", lambda self, raw: self._outbox.put(raw[:-1] + bytes([raw[-1] ^ 1]))
        )
        with pytest.raises(TrunkError, match="16 frames in a row: .* did not arrive"):
            forward(link, 0, 0, H, None)


def test_evaluation_survives_too() -> None:
    engine = engine_for(split(tiny_model(), CUT).trunk, TrainConfig())
    engine.open_round(1, 1, training=False)
    with served(engine, **QUICK) as service:
        calm = connect(service, "calm", 0, **QUICK)
        faults = Faults({(UP, 1): "lose", (DOWN, 1): "duplicate", (UP, 4): "break"})
        link = GrpcLink(
            admit(service, "a"),
            NODE_KEY,
            steps=0,
            config=link_config(**QUICK),
            interceptors=[faults],
        )
        for batch in range(4):
            h = H + batch
            assert torch.equal(forward(link, batch, 0, h, None), forward(calm, batch, 0, h, None))
        link.close()


def test_nobody_can_number_connections_backwards() -> None:
    with served(open_engine()) as running:
        link = connect(running, "a", 1)
        link._connection.open(5.0)
        link._connection.number = 0  # the client forgot, or somebody repeats what was seen
        with pytest.raises(TrunkError, match="used before"):
            link._connection.open(5.0)


def test_many_connections_of_one_client_hold_no_threads() -> None:
    """merged: its first frame waits for the cohort, and it connects again and again."""
    engine = engine_for(split(tiny_model(), CUT).trunk, TrainConfig(strategy="merged"), timeout=4.0)
    engine.open_round(1, 1, training=True, cohort=2)
    with served(engine) as service:
        link = connect(service, "greedy", 1)
        frame = compute_frame(H)
        for _ in range(12):
            link._connection.send(frame)
            time.sleep(0.02)
            link._connection.open(5.0)
        deadline = time.monotonic() + 10
        while _busy(service) > 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _busy(service) <= 2
        link._connection.drop()


def _busy(service: TrunkService) -> int:
    """Threads that are in a stream's work: the service's pool keeps the idle ones."""
    return len(service._server._state.rpc_states)


def test_one_who_only_repeats_itself_is_given_up() -> None:
    with served(open_engine(strategy="splitfed-v2")) as service:
        link = connect(service, "a", 1)
        forward(link, 0, 0, H, None)
        with pytest.raises(TrunkError, match=f"{MAX_REPEATS} frames in a row moved nothing"):
            for _ in range(MAX_REPEATS + 2):
                get_gradients(link, 1)
        link._connection.drop()
        assert forward(connect(service, "b", 1), 0, 0, H, None).shape == H.shape
