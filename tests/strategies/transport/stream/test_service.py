"""The data plane: who gets in, what is refused, what crosses the cut (invariants 5 and 7)."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.message import Message

from conf.schema import LinkConfig, TrainConfig
from flower_app.client import streamed
from flower_app.data.client import Batch
from models import split
from simulations.equality.fold import fold
from simulations.equality.local_link import LocalLink
from strategies.errors import TrunkError
from strategies.transport import tickets
from strategies.transport import trunk_pb2 as pb
from strategies.transport.frames import (
    WIRE_VERSION,
    _sealed,
    client_frame,
    read_client_frame,
    read_server_frame,
    refuse_failure,
)
from strategies.transport.link import StepCounters
from strategies.transport.stream.channel import Stream
from strategies.transport.stream.link import GrpcLink
from strategies.transport.stream.options import (
    CONNECTION_KEY,
    METHOD,
    SESSION_KEY,
    STEPS_KEY,
    TOKEN_KEY,
)
from strategies.transport.stream.service import TrunkService
from strategies.transport.tickets import Guest, Ticket, new_key, public_half, session_secret
from tests.strategies.helpers import (
    CUT,
    HIDDEN,
    NODE_KEY,
    H,
    admit,
    apply_frame,
    back,
    backward_frame,
    compute_frame,
    connect,
    engine_for,
    forward,
    get_gradients,
    largest_difference,
    link_config,
    open_engine,
    place,
    random_batch,
    random_steps,
    served,
    tiny_model,
    twin,
)

ONE = StepCounters(client_square_norm=0.0, tokens=1)


def sealed(head: pb.ClientFrame) -> bytes:
    """A frame of a head alone."""
    return _sealed(head.SerializeToString(), None)


def raw_call(
    service: TrunkService, frames: list[bytes], ticket: Ticket, token: str = ""
) -> list[pb.ServerFrame]:
    """All answers to these bytes, over a connection that shows `token`, or the right one."""
    secret = session_secret(NODE_KEY, ticket.trunk_key, ticket.nonce, ticket.session)
    metadata = (
        (SESSION_KEY, ticket.session),
        (CONNECTION_KEY, "1"),
        (TOKEN_KEY, token or tickets.token(secret, 1)),
        (STEPS_KEY, "3"),
    )
    with grpc.insecure_channel(service.address) as channel:
        call = channel.stream_stream(METHOD)(iter(frames), metadata=metadata, timeout=10)
        return [read_server_frame(raw).head for raw in call]


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16"])
def test_training_over_the_wire_equals_training_in_process(codec: str) -> None:
    """fp32 to the bit; half types within their rounding (row 11)."""
    train = TrainConfig(optimizer="sgd", lr=0.3, clip=1.0, accumulate=2)
    steps = random_steps(3, seed=5, accumulate=2)
    near, far = tiny_model(), tiny_model()
    for model, over_wire in ((near, False), (far, True)):
        parts = split(model, CUT)
        engine = engine_for(parts.trunk, train)
        engine.open_round(1, 1, training=True)
        with served(engine, codec=codec) as service:
            link: Any = (
                connect(service, "a", 3, codec=codec)
                if over_wire
                else LocalLink(engine.open("a", client="a", steps=3))
            )
            streamed.train(parts.bottom, parts.top, link, steps, 3, train, place("a"))
            link.close()
        fold(engine, {"a": 1.0})

    difference = largest_difference(near, far)
    assert difference <= {"fp32": 0.0, "bf16": 2e-2, "fp16": 2e-3}[codec]
    assert codec == "fp32" or difference > 0


def test_bf16_compute_stays_near_fp32() -> None:
    """Row 11: autocast in all parts; losses within 2 %."""
    losses = {}
    for precision in ("fp32", "bf16"):
        train = TrainConfig(optimizer="sgd", lr=0.1, precision=precision)
        parts = split(tiny_model(), CUT)
        engine = engine_for(parts.trunk, train)
        engine.open_round(1, 1, training=True)
        link = LocalLink(engine.open("a", client="a", steps=3))
        outcome = streamed.train(
            parts.bottom, parts.top, link, random_steps(3, seed=2), 3, train, place("a")
        )
        losses[precision] = outcome.losses

    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("token", ["x", "0" * 64])
def test_without_its_token_nothing_reaches_the_trunk(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    monkeypatch.setattr(engine, "open", lambda *a, **k: pytest.fail("the engine was reached"))
    with served(engine) as service:
        ticket = admit(service, "a")
        for session in ("a", "b"):
            with pytest.raises(grpc.RpcError) as refused:
                raw_call(service, [], replace(ticket, session=session), token)

    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_ticket_opens_one_session_once_and_only_in_its_round() -> None:
    engine = open_engine()
    with served(engine) as service:
        ticket, config = admit(service, "a"), LinkConfig()
        link = GrpcLink(ticket, NODE_KEY, steps=1, config=config)
        with pytest.raises(TrunkError, match="was used before"):
            GrpcLink(ticket, NODE_KEY, steps=1, config=config)
        forward(link, 0, 0, H, None)

        late = admit(service, "b")
        service.end_round()
        with pytest.raises(TrunkError, match="its round has ended"):
            GrpcLink(late, NODE_KEY, steps=1, config=config)
        with pytest.raises(TrunkError, match="its round has ended"):
            forward(link, 0, 1, H, None)


def test_a_stolen_ticket_is_of_no_use_without_its_nodes_key() -> None:
    """Nor does the token of a connection that somebody saw open another one."""
    engine = open_engine()
    with served(engine) as service:
        ticket, config = admit(service, "a"), LinkConfig()
        with pytest.raises(TrunkError, match="it is not its node's") as refused:
            GrpcLink(ticket, new_key(), steps=1, config=config)
        assert refused.value.kind == "refused"
        assert not engine.has("a")

        secret = session_secret(NODE_KEY, ticket.trunk_key, ticket.nonce, ticket.session)
        seen = tickets.token(secret, 1)
        link = GrpcLink(ticket, NODE_KEY, steps=1, config=config)
        with pytest.raises(grpc.RpcError) as replayed:
            raw_call(service, [], ticket, seen)
        assert replayed.value.code() == grpc.StatusCode.UNAUTHENTICATED
        # A ticket for one session does not open another's, whatever it says.
        admit(service, "b")
        with pytest.raises(TrunkError, match="it is not its node's"):
            GrpcLink(replace(ticket, session="b"), NODE_KEY, steps=1, config=config)
        assert forward(link, 0, 0, H, None).shape == H.shape  # its owner is not disturbed


def test_a_ticket_for_a_key_that_is_none_is_refused() -> None:
    with served(open_engine()) as service, pytest.raises(ValueError, match="32 bytes"):
        service.ticket(Guest(key="a", client="a", public_key=b"short"))


def test_a_session_cannot_reach_anothers_gradients() -> None:
    """Invariant 7: same step, same micro-batch, other session."""
    engine = open_engine()
    with served(engine) as service:
        mine, other = connect(service, "mine", 1), connect(service, "other", 1)
        forward(mine, 0, 0, H, None)
        back(mine, 0, 0, torch.ones_like(H), last=True)

        with pytest.raises(TrunkError, match="no gradient is kept of frame 2"):
            get_gradients(other, 2)

        assert get_gradients(mine, 2).square_norm > 0
        mine.apply(0, ONE)
        mine.applied()
        mine.close()


@pytest.mark.parametrize(
    ("frame", "word"),
    [
        (b"\xff\xff\xff\xff", "did not arrive as it was sent"),
        (_sealed(b"\xff\xff\xff\xff", None), "is not a Graft frame"),
        (sealed(pb.ClientFrame(version=7, close=pb.Close())), "version 7 came"),
        (sealed(pb.ClientFrame(version=WIRE_VERSION)), "without a body"),
        (client_frame(number=1, compute=pb.Compute()), "activations: 0 dimensions"),
        (
            compute_frame(torch.ones(2, 3, 9)),
            r"\(2, 3, 9\); the trunk takes \(B, T, 32\)",
        ),
        (
            compute_frame(H, codec="bf16"),
            "bf16 came, fp32 was agreed",
        ),
        (
            backward_frame(torch.ones(2, 3, 9)),
            "no forward to go back through",
        ),
        (
            apply_frame({"x": torch.ones(9)}),
            "without train.sync=step they stay with their client",
        ),
        (
            compute_frame(H * float("nan")),
            "not finite",
        ),
    ],
)
def test_hostile_frames_are_answered_in_words(frame: bytes, word: str) -> None:
    with served(open_engine()) as service:
        replies = raw_call(service, [frame], admit(service, "a"))

    assert replies[-1].WhichOneof("body") == "failure"
    with pytest.raises(TrunkError, match=word):
        raise TrunkError(replies[-1].failure.message)


def test_random_bytes_never_bring_the_service_down() -> None:
    with served(open_engine()) as service:
        for size in (1, 10, 1000):
            replies = raw_call(service, [os.urandom(size)], admit(service, f"{size}"))
            assert replies[-1].WhichOneof("body") == "failure"
        link = connect(service, "well-behaved", 1)
        assert forward(link, 0, 0, H, None).shape == H.shape


def test_a_frame_over_the_limit_is_refused_on_both_sides() -> None:
    big = torch.zeros(4, 100, HIDDEN)
    with served(open_engine(), max_frame_mb=0.01) as service:
        link = connect(service, "a", 1, max_frame_mb=0.01)
        with pytest.raises(TrunkError, match=r"exceeds link.max_frame_mb=0\.01; raise it"):
            forward(link, 0, 0, big, None)

        careless = connect(service, "b", 1, max_frame_mb=64.0)
        with pytest.raises(TrunkError, match="larger than max"):
            forward(careless, 0, 0, big, None)


def test_an_error_in_the_trunk_reaches_the_client_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine()
    with served(engine) as service:
        link = connect(service, "a", 1)
        with pytest.raises(TrunkError, match="step 2 came, step 0 was due"):
            forward(link, 2, 0, H, None)

        def broken(*args: object) -> None:
            raise RuntimeError("the disk of the server is full")

        link = connect(service, "b", 1)
        monkeypatch.setattr(engine.bench, "forward", broken)
        with pytest.raises(TrunkError, match="the disk of the server is full"):
            forward(link, 0, 0, H, None)


def test_nobody_at_the_address_is_said_with_the_remedy() -> None:
    with pytest.raises(TrunkError, match=r"no trunk answers at 127.0.0.1:1; check"):
        GrpcLink(
            Ticket(
                session="a",
                address="127.0.0.1:1",
                nonce=bytes(32),
                trunk_key=public_half(new_key()),
            ),
            NODE_KEY,
            steps=1,
            config=link_config(timeout=1.0),
        )


def test_a_silent_trunk_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, release = open_engine(), threading.Event()
    with served(engine) as service:
        link = connect(service, "a", 1, timeout=0.3)
        monkeypatch.setattr(
            type(engine._sessions["a"]), "compute", lambda *a, **how: release.wait(5) and H
        )
        with pytest.raises(TrunkError, match=r"did not answer within 0\.3 s; raise link.timeout"):
            forward(link, 0, 0, H, None)
        release.set()


def test_a_silent_client_loses_its_session_and_its_turn() -> None:
    engine = open_engine(strategy="splitfed-v2")
    with served(engine, timeout=0.4) as service:
        silent = connect(service, "silent", 1)
        forward(silent, 0, 0, H, None)

        deadline = time.monotonic() + 10
        while not engine._sessions["silent"]._closed and time.monotonic() < deadline:
            time.sleep(0.05)

        assert engine._sessions["silent"]._closed
        assert forward(connect(service, "other", 1), 0, 0, H, None).shape == H.shape


def test_a_client_that_dies_in_its_turn_gives_it_back() -> None:
    engine = open_engine(strategy="splitfed-v2")
    with served(engine, grace=0.3) as service:
        dying = connect(service, "dying", 1)
        forward(dying, 0, 0, H, None)
        dying.abort()

        other = connect(service, "other", 1, timeout=10.0)
        assert forward(other, 0, 0, H, None).shape == H.shape


def test_tls_with_a_certificate_made_for_the_run() -> None:
    engine = open_engine()
    with served(engine, tls="on") as service:
        assert service.certificate.startswith(b"-----BEGIN CERTIFICATE-----")
        link = connect(service, "a", 1)
        assert forward(link, 0, 0, H, None).shape == H.shape
        link.abort()

        with pytest.raises(TrunkError, match=r"link.tls is the same on both sides"):
            GrpcLink(
                replace(admit(service, "plain"), certificate=b""),
                NODE_KEY,
                steps=1,
                config=link_config(timeout=1.5),
            )


@pytest.mark.parametrize(("advertise", "secure"), [("", False), ("trunk.example.org:9", True)])
def test_tls_is_on_outside_loopback(advertise: str, secure: bool) -> None:
    with served(open_engine(), bind=f"127.0.0.1:{free_port()}", advertise=advertise) as service:
        assert bool(service.certificate) is secure


def test_a_taken_port_is_said() -> None:
    with served(open_engine()) as service, pytest.raises(ValueError) as caught:
        TrunkService(open_engine(), LinkConfig(bind=service.address))

    port = service.address.rpartition(":")[2]
    assert f"link.bind={service.address}: port {port} is taken" in str(caught.value)
    assert "Choose a free port" in str(caught.value)
    assert "Failed" not in str(caught.value)  # gRPC's words


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ports_are_reported_and_steps_counted_once() -> None:
    reports = []
    engine = open_engine()
    with served(engine) as service:
        service.on_step = reports.append
        link = connect(service, "a", 2)
        for step in range(2):
            forward(link, step, 0, H, None)
            back(link, step, 0, torch.ones_like(H), last=True)
            link.apply(step, StepCounters(client_square_norm=0.0, tokens=7, loss=1.5))
            link._put(link._asked[0].raw)  # its reply was lost, say
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


def tap(monkeypatch: pytest.MonkeyPatch) -> Tap:
    """Note what links send and receive from here on."""
    tapped, send, receive = Tap(), Stream.send, Stream.receive

    def send_tapped(self: Stream, raw: bytes) -> None:
        tapped.sent.append(raw)
        send(self, raw)

    def receive_tapped(self: Stream, timeout: float) -> bytes | None:
        raw = receive(self, timeout)
        tapped.received += [raw] if raw is not None else []
        return raw

    monkeypatch.setattr(Stream, "send", send_tapped)
    monkeypatch.setattr(Stream, "receive", receive_tapped)
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
        streamed.train(parts.bottom, parts.top, link, steps, 3, train, place("a"))
        link.close()

    assert len(wire.sent) == 3 * (2 * 2 + 1) + 1
    assert len(wire.received) == len(wire.sent) + 1
    batches = [batch for step in steps for batch in step]
    frames = wire.sent + wire.received
    assert secrets_found(frames, batches) == []
    leaked = [*frames, b"x" + batches[0].labels.numpy().tobytes()]
    assert secrets_found(leaked, batches), "the check itself sees nothing"

    counters = {
        "version",
        "number",
        "seen",
        "step",
        "micro",
        "last",
        "tokens",
        "loss",
        "client_square_norm",
    }
    counters |= {"seconds_bottom", "seconds_network", "seconds_top"}
    counters |= {"mask", "frozen", "number"}
    tensor = {"shape", "codec", "offset", "size"}
    for raw in wire.sent:
        for name in leaves(read_client_frame(raw).head):
            *_, parent, leaf = ("", *name.split("."))
            known = tensor if parent in ("activations", "gradient") else counters
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
            outcome = streamed.train(parts.bottom, parts.top, link, steps, 3, train, place("a"))
            link.close()
        fold(engine, {"a": 1.0})
        curves.append((outcome.losses, twin(model)))

    assert curves[0][0] == curves[1][0]
    assert largest_difference(curves[0][1], curves[1][1]) == 0


def test_a_trunk_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that it cannot be reached: nothing is wrong with its address."""
    monkeypatch.setattr("strategies.transport.stream.service.MAX_STREAMS", 1)
    with served(open_engine()) as service:
        first = connect(service, "first", 1)
        with pytest.raises(TrunkError, match="as many clients as it can.*fraction_train") as caught:
            connect(service, "second", 1, timeout=1.0)
        first.close()

    assert caught.value.kind == "full"


def test_a_client_that_comes_back_is_told_why_it_was_refused() -> None:
    """The frame that said so was lost with its stream."""
    engine = open_engine()
    with served(engine) as service:
        ticket = admit(service, "one")
        with pytest.raises(TrunkError, match="at least 1 step"):
            GrpcLink(ticket, NODE_KEY, steps=0, config=link_config())
        secret = tickets.session_secret(NODE_KEY, ticket.trunk_key, ticket.nonce, ticket.session)
        again = Stream(ticket, secret, number=2, steps=0, limit=2**20, grace=1.0)

        with pytest.raises(TrunkError, match="at least 1 step"):
            refuse_failure(read_server_frame(again.receive(5) or b""))
        again.drop()


def test_a_server_that_stops_leaves_no_session_waiting_for_another() -> None:
    """Else the process could not end: under merged, one session waits for what all have to send."""
    engine = engine_for(split(tiny_model(), CUT).trunk, TrainConfig(strategy="merged"))
    engine.open_round(1, 1, training=True, cohort=2)
    before = set(threading.enumerate())
    with served(engine) as service:
        links = [connect(service, key, 1) for key in ("a", "b")]
        links[0].compute(0, 0, torch.randn(1, 4, HIDDEN), None)
        links[0]._connection.receive(0.5)  # it has come, and waits for b's
    deadline = time.monotonic() + 10
    while busy := [
        thread
        for thread in set(threading.enumerate()) - before
        if thread.name.startswith("graft-session") and not _idle(thread)
    ]:
        assert time.monotonic() < deadline, busy
        time.sleep(0.05)


def _idle(thread: threading.Thread) -> bool:
    """Whether a thread of a pool has nothing to do."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != "_serve":
        frame = frame.f_back
    return frame is None
