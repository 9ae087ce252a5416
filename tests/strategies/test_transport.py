"""The data plane: who gets in, what is refused, what crosses the cut (invariants 5 and 7)."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.message import Message

from conf.schema import LinkConfig, TrainConfig
from flower_app import training
from flower_app.data import Batch
from models import split
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec import WIRE_VERSION, encode
from strategies.transport.link import GrpcLink, LocalLink, StepCounters
from strategies.transport.service import METHOD, TOKEN_KEY, TrunkService
from strategies.trunk import TrunkEngine
from tests.strategies.helpers import (
    CUT,
    HIDDEN,
    connect,
    engine_for,
    largest_difference,
    place,
    random_batch,
    random_steps,
    served,
    tiny_model,
    twin,
)

H = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
ONE = StepCounters(client_square_norm=0.0, tokens=1)


def open_engine(*, training: bool = True, **train: object) -> TrunkEngine:
    engine = engine_for(split(tiny_model(), CUT).trunk, TrainConfig(**train))  # type: ignore[arg-type]
    engine.open_round(1, 1, training=training)
    return engine


def raw_call(service: TrunkService, frames: list[bytes], token: str) -> list[pb.ServerFrame]:
    with grpc.insecure_channel(service.address) as channel:
        call = channel.stream_stream(METHOD)(
            iter(frames), metadata=((TOKEN_KEY, token), ("graft-steps", "3")), timeout=10
        )
        return [pb.ServerFrame.FromString(raw) for raw in call]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_training_over_the_wire_equals_training_in_process(dtype: str) -> None:
    """fp32 to the bit; half types within their rounding (row 11)."""
    train = TrainConfig(optimizer="sgd", lr=0.3, clip=1.0, accumulate=2)
    steps = random_steps(3, seed=5, accumulate=2)
    near, far = tiny_model(), tiny_model()
    for model, over_wire in ((near, False), (far, True)):
        parts = split(model, CUT)
        engine = engine_for(parts.trunk, train)
        engine.open_round(1, 1, training=True)
        with served(engine, dtype=dtype) as service:
            link: Any = (
                connect(service, "a", 3, dtype=dtype)
                if over_wire
                else LocalLink(engine.open("a", client="a", steps=3))
            )
            training.train(parts.bottom, parts.top, link, steps, 3, train, place("a"))
            link.close()
        engine.close_round({"a": 1.0})

    difference = largest_difference(near, far)
    assert difference <= {"fp32": 0.0, "bf16": 2e-2, "fp16": 2e-3}[dtype]
    assert dtype == "fp32" or difference > 0


def test_bf16_compute_stays_near_fp32() -> None:
    """Row 11: autocast in all parts; losses within 2 %."""
    losses = {}
    for precision in ("fp32", "bf16"):
        train = TrainConfig(optimizer="sgd", lr=0.1, precision=precision)
        parts = split(tiny_model(), CUT)
        engine = engine_for(parts.trunk, train)
        engine.open_round(1, 1, training=True)
        link = LocalLink(engine.open("a", client="a", steps=3))
        outcome = training.train(
            parts.bottom, parts.top, link, random_steps(3, seed=2), 3, train, place("a")
        )
        losses[precision] = outcome.losses

    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_without_its_token_nothing_reaches_the_trunk(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    monkeypatch.setattr(engine, "open", lambda *a, **k: pytest.fail("the engine was reached"))
    with served(engine) as service:
        service.admit("a")
        with pytest.raises(grpc.RpcError) as refused:
            raw_call(service, [], token)

    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_token_opens_one_session_once_and_only_in_its_round() -> None:
    engine = open_engine()
    with served(engine) as service:
        token = service.admit("a")
        config = LinkConfig()
        link = GrpcLink(service.address, token, client="a", steps=1, config=config)
        with pytest.raises(TrunkError, match="was used before"):
            GrpcLink(service.address, token, client="a", steps=1, config=config)
        link.compute(0, 0, H, None)

        late = service.admit("b")
        service.end_round()
        with pytest.raises(TrunkError, match="its round has ended"):
            GrpcLink(service.address, late, client="b", steps=1, config=config)
        with pytest.raises(TrunkError):
            link.compute(0, 1, H, None)
            link.compute(0, 2, H, None)


def test_a_session_cannot_reach_anothers_gradients() -> None:
    """Invariant 7: same step, same micro-batch, other session."""
    engine = open_engine()
    with served(engine) as service:
        mine, other = connect(service, "mine", 1), connect(service, "other", 1)
        mine.compute(0, 0, H, None)
        mine.backward(0, 0, torch.ones_like(H), last=True)

        with pytest.raises(TrunkError, match="no gradient of step 0"):
            other.get_gradients(0, 0)

        assert mine.get_gradients(0, 0)[1] > 0
        mine.apply(0, ONE)
        mine.applied()
        mine.close()


@pytest.mark.parametrize(
    ("frame", "word"),
    [
        (b"\xff\xff\xff\xff", "is not a Graft frame"),
        (pb.ClientFrame(version=7, close=pb.Close()).SerializeToString(), "version 7 came"),
        (pb.ClientFrame(version=WIRE_VERSION).SerializeToString(), "without a body"),
        (
            pb.ClientFrame(version=WIRE_VERSION, compute=pb.Compute()).SerializeToString(),
            "activations: 0 dimensions",
        ),
        (
            pb.ClientFrame(
                version=WIRE_VERSION,
                compute=pb.Compute(activations=encode(torch.ones(2, 3, 9), torch.float32)),
            ).SerializeToString(),
            r"\(2, 3, 9\); the trunk takes \(B, T, 32\)",
        ),
    ],
)
def test_hostile_frames_are_answered_in_words(frame: bytes, word: str) -> None:
    with served(open_engine()) as service:
        replies = raw_call(service, [frame], service.admit("a"))

    assert replies[-1].WhichOneof("body") == "failure"
    with pytest.raises(TrunkError, match=word):
        raise TrunkError(replies[-1].failure.message)


def test_random_bytes_never_bring_the_service_down() -> None:
    with served(open_engine()) as service:
        for size in (1, 10, 1000):
            replies = raw_call(service, [os.urandom(size)], service.admit(f"{size}"))
            assert replies[-1].WhichOneof("body") == "failure"
        link = connect(service, "well-behaved", 1)
        assert link.compute(0, 0, H, None).shape == H.shape


def test_a_frame_over_the_limit_is_refused_on_both_sides() -> None:
    big = torch.zeros(4, 100, HIDDEN)
    with served(open_engine(), max_frame_mb=0.01) as service:
        link = connect(service, "a", 1, max_frame_mb=0.01)
        with pytest.raises(TrunkError, match=r"exceeds link.max_frame_mb=0\.01; raise it"):
            link.compute(0, 0, big, None)

        careless = connect(service, "b", 1, max_frame_mb=64.0)
        with pytest.raises(TrunkError, match="larger than max"):
            careless.compute(0, 0, big, None)


def test_an_error_in_the_trunk_reaches_the_client_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine()
    with served(engine) as service:
        link = connect(service, "a", 1)
        with pytest.raises(TrunkError, match="step 2 came, step 0 was due"):
            link.compute(2, 0, H, None)

        def broken(*args: object) -> None:
            raise RuntimeError("the disk of the server is full")

        link = connect(service, "b", 1)
        monkeypatch.setattr(type(engine._sessions["b"]), "_forward", broken)
        with pytest.raises(TrunkError, match="the disk of the server is full"):
            link.compute(0, 0, H, None)


def test_nobody_at_the_address_is_said_with_the_remedy() -> None:
    with pytest.raises(TrunkError, match=r"no trunk answers at 127.0.0.1:1; check"):
        GrpcLink("127.0.0.1:1", "t", client="a", steps=1, config=LinkConfig(timeout=1.0))


def test_a_silent_trunk_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, release = open_engine(), threading.Event()
    with served(engine) as service:
        link = connect(service, "a", 1, timeout=0.3)
        monkeypatch.setattr(
            type(engine._sessions["a"]), "compute", lambda self, *a: release.wait(5) and H
        )
        with pytest.raises(TrunkError, match=r"did not answer within 0\.3 s; raise link.timeout"):
            link.compute(0, 0, H, None)
        release.set()


def test_a_silent_client_loses_its_session_and_its_turn() -> None:
    engine = open_engine(strategy="splitfed-v2")
    with served(engine, timeout=0.4) as service:
        silent = connect(service, "silent", 1)
        silent.compute(0, 0, H, None)

        deadline = time.monotonic() + 10
        while not engine._sessions["silent"]._closed and time.monotonic() < deadline:
            time.sleep(0.05)

        assert engine._sessions["silent"]._closed
        assert connect(service, "other", 1).compute(0, 0, H, None).shape == H.shape


def test_a_client_that_dies_in_its_turn_gives_it_back() -> None:
    engine = open_engine(strategy="splitfed-v2")
    with served(engine) as service:
        dying = connect(service, "dying", 1)
        dying.compute(0, 0, H, None)
        dying._channel.close()

        other = connect(service, "other", 1, timeout=10.0)
        assert other.compute(0, 0, H, None).shape == H.shape


def test_tls_with_a_certificate_made_for_the_run() -> None:
    engine = open_engine()
    with served(engine, tls="on") as service:
        assert service.certificate.startswith(b"-----BEGIN CERTIFICATE-----")
        link = connect(service, "a", 1)
        assert link.compute(0, 0, H, None).shape == H.shape
        link.abort()

        with pytest.raises(TrunkError, match=r"link.tls is the same on both sides"):
            GrpcLink(
                service.address,
                service.admit("plain"),
                client="plain",
                steps=1,
                config=LinkConfig(timeout=1.5),
            )


@pytest.mark.parametrize(("bind", "secure"), [("127.0.0.1:0", False), ("0.0.0.0:0", True)])
def test_tls_is_on_outside_loopback(bind: str, secure: bool) -> None:
    with served(open_engine(), bind=bind) as service:
        assert bool(service.certificate) is secure


def test_a_taken_port_is_said() -> None:
    with served(open_engine()) as service, pytest.raises(ValueError, match="Choose a free port"):
        TrunkService(open_engine(), LinkConfig(bind=service.address))


def test_ports_are_reported_and_steps_counted_once() -> None:
    reports = []
    engine = open_engine()
    with served(engine) as service:
        service.on_step = reports.append
        link = connect(service, "a", 2)
        for step in range(2):
            link.compute(step, 0, H, None)
            link.backward(step, 0, torch.ones_like(H), last=True)
            for _ in range(2):  # its reply was lost, say
                link.apply(step, StepCounters(client_square_norm=0.0, tokens=7, loss=1.5))
                link.applied()
        link.close()

    assert [(r.client, r.step, r.tokens, r.loss) for r in reports] == [
        ("a", 0, 7, 1.5),
        ("a", 1, 7, 1.5),
    ]
    assert reports[0].bytes_up > 2 * H.numel() * 4
    assert sum(r.bytes_up for r in reports) <= link.bytes_up
    assert all(value >= 0 for r in reports for value in r.seconds.values())


@dataclass
class Tap:
    """Every frame's bytes as they cross the wire."""

    sent: list[bytes] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)


class TappedQueue:
    """A queue that notes the frames put into it."""

    def __init__(self, inner: Any, frames: list[bytes]) -> None:
        self._inner, self._frames = inner, frames
        self.get = inner.get

    def put(self, raw: Any) -> None:
        if isinstance(raw, bytes):
            self._frames.append(raw)
        self._inner.put(raw)


def tap(monkeypatch: pytest.MonkeyPatch) -> Tap:
    """Note what links send and receive from here on."""
    tapped, read = Tap(), GrpcLink._read

    def start_reading(self: GrpcLink, call: Any) -> None:
        self._inbox = TappedQueue(self._inbox, tapped.received)  # type: ignore[assignment]
        read(self, call)

    send = GrpcLink._send

    def send_tapped(self: GrpcLink, **body: object) -> None:
        if not isinstance(self._outbox, TappedQueue):
            self._outbox = TappedQueue(self._outbox, tapped.sent)  # type: ignore[assignment]
        send(self, **body)

    monkeypatch.setattr(GrpcLink, "_read", start_reading)
    monkeypatch.setattr(GrpcLink, "_send", send_tapped)
    return tapped


def leaves(message: Message, path: str = "") -> dict[str, list[Any]]:
    """All values of a message by the path of their field."""
    found: dict[str, list[Any]] = {}
    for described, value in message.ListFields():
        name = f"{path}{described.name}"
        if isinstance(value, Message):
            found.update(leaves(value, f"{name}."))
        else:
            found[name] = list(value) if described.is_repeated else [value]
    return found


def secrets_found(frames: list[bytes], batches: list[Batch]) -> list[str]:
    """Which frames carry a sequence's ids or labels, in any integer or float type."""
    found = []
    types = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float16)
    for batch in batches:
        for name in ("input_ids", "labels"):
            for row in getattr(batch, name):
                # Six tokens in a row do not turn up by chance.
                kept = row[row > 0][:6]
                for dtype in types:
                    pattern = kept.to(dtype).numpy().tobytes()
                    found += [f"{name} as {dtype}" for frame in frames if pattern in frame]
    return found


def test_no_frame_carries_ids_or_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 5 and row 32: tensors, a mask of bits, and counters; nothing else."""
    model, train = tiny_model(), TrainConfig(accumulate=2)
    steps = random_steps(3, seed=9, accumulate=2)
    parts = split(model, CUT)
    engine = engine_for(parts.trunk, train)
    engine.open_round(1, 1, training=True)
    with served(engine) as service:
        wire = tap(monkeypatch)
        link = connect(service, "a", 3)
        training.train(parts.bottom, parts.top, link, steps, 3, train, place("a"))
        link.close()

    assert len(wire.sent) == 3 * (2 * 2 + 1) + 1
    assert len(wire.received) == len(wire.sent) + 1
    batches = [batch for step in steps for batch in step]
    frames = wire.sent + wire.received
    assert secrets_found(frames, batches) == []
    leaked = [*frames, b"x" + batches[0].labels.numpy().tobytes()]
    assert secrets_found(leaked, batches), "the check itself sees nothing"

    counters = {"version", "step", "micro", "last", "tokens", "loss", "client_square_norm"}
    counters |= {"seconds_bottom", "seconds_network", "seconds_top"}
    tensor = {"version", "dtype", "shape", "codec", "scale", "data"}
    for raw in wire.sent:
        for name in leaves(pb.ClientFrame.FromString(raw)):
            *_, parent, leaf = ("", *name.split("."))
            known = tensor if parent in ("activations", "gradient", "mask") else counters
            assert leaf in known, name


def test_two_runs_send_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 29: a run repeats exactly, dropout and all; only clocks differ."""
    train, curves = TrainConfig(lr=1e-2), []
    for _ in range(2):
        model = tiny_model("gpt2", resid_pdrop=0.3)
        parts = split(model, CUT)
        engine = engine_for(parts.trunk, train, seed=4)
        engine.open_round(1, 1, training=True)
        torch.rand(3)
        with served(engine) as service:
            link = connect(service, "a", 3)
            steps = [[random_batch(s)] for s in range(3)]
            outcome = training.train(parts.bottom, parts.top, link, steps, 3, train, place("a"))
            link.close()
        engine.close_round({"a": 1.0})
        curves.append((outcome.losses, twin(model)))

    assert curves[0][0] == curves[1][0]
    assert largest_difference(curves[0][1], curves[1][1]) == 0
