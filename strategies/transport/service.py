"""The trunk engine behind gRPC: one bidirectional stream per session."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from google.protobuf.message import DecodeError

from conf.schema import LinkConfig
from models import Cut
from strategies.errors import TrunkError
from strategies.session import Session
from strategies.transport import trunk_pb2 as pb
from strategies.transport.certificates import is_loopback, self_signed
from strategies.transport.codec import (
    WIRE_DTYPES,
    WIRE_VERSION,
    decode,
    decode_named,
    encode,
    encode_named,
    shape_of,
)
from strategies.trunk import TrunkEngine

logger = logging.getLogger(__name__)

METHOD = "/graft.Trunk/Session"
TOKEN_KEY, CLIENT_KEY, STEPS_KEY = "graft-token", "graft-client", "graft-steps"
IDLE_SHARE, TURN_SHARE = 0.5, 0.75
"""Of `link.timeout`, which a client waits for a reply: how long the trunk waits for a client's next
frame, and for a turn. In this order, so that a dead client's turn is free before others give up."""

MAX_SESSIONS = 256
"""Streams served at once; each takes a thread while it is open."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One applied step as seen from the trunk, for the run's metrics."""

    key: str
    client: str
    step: int
    steps: int
    loss: float
    tokens: int
    grad_norm: float
    lr: float
    bytes_up: int
    bytes_down: int
    seconds: dict[str, float]


@dataclass(eq=False)
class _Traffic:
    """What one session has moved since its last step, and when it last said something."""

    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    waiting_since: float | None = None


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A session whose stream ended without a good-bye."""

    since: float
    """When, by `time.monotonic`."""
    done: int
    """Optimizer steps that were applied."""
    steps: int
    """Optimizer steps that were planned."""


class TrunkService:
    """Serves a `TrunkEngine` to clients that hold a token of the open round.

    Parameters
    ----------
    engine : TrunkEngine
        What the sessions drive.
    link : LinkConfig
        Address, TLS, limits, deadlines and the type of tensors on the wire.
    on_step : callable
        Called with a `StepReport` after each step, from the session's own thread.

    Raises
    ------
    ValueError
        If the address cannot be bound or the certificate cannot be read.
    """

    def __init__(
        self,
        engine: TrunkEngine,
        link: LinkConfig,
        on_step: Callable[[StepReport], None] = lambda report: None,
    ) -> None:
        self._engine, self._link, self.on_step = engine, link, on_step
        self._dtype = WIRE_DTYPES[link.dtype]
        self._tokens: dict[str, str] = {}
        self._cuts: dict[str, Cut | None] = {}
        self._broken: dict[str, Broken] = {}
        self._calls: dict[grpc.ServicerContext, _Traffic] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        limit = int(link.max_frame_mb * 2**20)
        self._server = grpc.server(
            ThreadPoolExecutor(MAX_SESSIONS, thread_name_prefix="graft-session"),
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("graft.Trunk", {"Session": handler}),)
        )
        self.certificate, port = self._bind()
        host = link.bind.rpartition(":")[0]
        self.address = link.advertise or f"{host}:{port}"

    def start(self) -> str:
        """Accept sessions; returns the address that clients connect to."""
        self._server.start()
        threading.Thread(target=self._end_idle_sessions, daemon=True, name="graft-idle").start()
        return self.address

    def admit(self, key: str, cut: Cut | None = None) -> str:
        """Issue the token (256 random bits) that opens session `key`, once, in this round.

        Parameters
        ----------
        key : str
            Names the session; it differs in every round and attempt.
        cut : Cut, optional
            The client's own cut, if it is not the trunk's.
        """
        token = secrets.token_hex(32)
        with self._lock:
            self._tokens[token] = key
            self._cuts[key] = cut
        return token

    def broken(self, key: str) -> Broken | None:
        """When and where session `key` lost its stream; None if it did not, or has not begun."""
        with self._lock:
            return self._broken.get(key)

    def end_round(self) -> None:
        """Withdraw all tokens and end the streams that are still open."""
        with self._lock:
            self._tokens.clear()
            self._cuts.clear()
            self._broken.clear()
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def stop(self) -> None:
        """Refuse new sessions and end the open ones."""
        self._stopped.set()
        self._server.stop(grace=1.0).wait()

    def _bind(self) -> tuple[bytes, int]:
        link, host = self._link, self._link.bind.rpartition(":")[0]
        public = (link.advertise or link.bind).rpartition(":")[0]
        secure = link.tls == "on" or (
            link.tls == "auto" and not (is_loopback(host) and is_loopback(public))
        )
        certificate = b""
        try:
            if not secure:
                port = self._server.add_insecure_port(link.bind)
            else:
                if link.certificate:
                    certificate = Path(link.certificate).read_bytes()
                    key = Path(link.key).read_bytes()
                else:
                    certificate, key = self_signed(public)
                credentials = grpc.ssl_server_credentials([(key, certificate)])
                port = self._server.add_secure_port(link.bind, credentials)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the trunk cannot listen on link.bind={link.bind}: {error}. Choose a free port, "
                "or port 0 for any"
            ) from error
        return certificate, port

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = dict(context.invocation_metadata())
        with self._lock:
            key = self._tokens.pop(str(metadata.get(TOKEN_KEY, "")), None)
        if key is None:
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "no session has this token: it is wrong, was used before, or its round has ended",
            )
        traffic = _Traffic()
        with self._lock:
            self._calls[context] = traffic
        session: Session | None = None
        closed = False
        try:
            session = self._open(str(key), metadata)
            opened = pb.Opened(hidden_size=self._engine.hidden_size, steps=session.steps)
            yield _frame(traffic, opened=opened)
            closed = yield from self._converse(str(key), session, requests, traffic)
        except TrunkError as error:
            logger.warning("session %s: %s", key, error)
            yield _frame(traffic, failure=pb.Failure(kind=error.kind, message=str(error)))
        finally:
            with self._lock:
                self._calls.pop(context, None)
                if session is not None and not closed and key in self._cuts:
                    self._broken[key] = Broken(
                        since=time.monotonic(), done=session.applied, steps=session.steps
                    )
            if session is not None:
                session.close()

    def _open(self, key: str, metadata: dict[str, str | bytes]) -> Session:
        try:
            steps = int(metadata.get(STEPS_KEY, "0"))
        except ValueError as error:
            raise TrunkError(f"{STEPS_KEY} must be a whole number: {error}") from error
        client = str(metadata.get(CLIENT_KEY, ""))
        with self._lock:
            cut = self._cuts.get(key)
        return self._engine.open(key, client=client, steps=steps, cut=cut)

    def _converse(
        self, key: str, session: Session, requests: Iterator[bytes], traffic: _Traffic
    ) -> Generator[bytes, None, bool]:
        """Answer frames until the client closes or falls silent; returns whether it closed."""
        while True:
            # Neither sending nor reading may hold a client up who does not read or send.
            traffic.waiting_since = time.monotonic()
            raw = next(requests, None)
            traffic.waiting_since = None
            if raw is None:
                return False
            traffic.bytes_up += len(raw)
            started = time.perf_counter()
            reply = self._answer(key, session, _parse(raw), traffic, started)
            traffic.seconds += time.perf_counter() - started
            traffic.waiting_since = time.monotonic()
            yield _frame(traffic, **reply)
            if "closed" in reply:
                return True

    def _answer(
        self,
        key: str,
        session: Session,
        frame: pb.ClientFrame,
        traffic: _Traffic,
        started: float,
    ) -> dict[str, Any]:
        body = frame.WhichOneof("body")
        if body == "compute":
            return {"activations": self._compute(session, frame.compute, started)}
        if body == "backward":
            return {"gradients": self._backward(session, frame.backward, started)}
        if body == "get_gradients":
            return {"gradients": self._again(session, frame.get_gradients, started)}
        if body == "apply":
            return {"applied": self._apply(key, session, frame.apply, traffic)}
        return {"closed": pb.Closed(steps=session.applied, tokens=session.tokens)}

    def _compute(self, session: Session, frame: pb.Compute, started: float) -> pb.Activations:
        masked = frame.HasField("mask")
        # Before memory is taken: a mask unpacks to 64 times its bytes, attention grows with T * T.
        session.check_shapes(
            shape_of(frame.activations, "activations"),
            shape_of(frame.mask, "mask") if masked else None,
        )
        h_BTD = decode(frame.activations, "activations")
        mask_BT = decode(frame.mask, "mask") if masked else None
        if mask_BT is not None and mask_BT.dtype != torch.bool:
            raise TrunkError(f"the mask must be BOOL, got {mask_BT.dtype}", kind="codec")
        mask_BT = None if mask_BT is None else mask_BT.long()
        h_BTD = session.compute(frame.step, frame.micro, h_BTD, mask_BT)
        return pb.Activations(
            step=frame.step,
            micro=frame.micro,
            activations=encode(h_BTD, self._dtype),
            seconds=time.perf_counter() - started,
        )

    def _backward(self, session: Session, frame: pb.Backward, started: float) -> pb.Gradients:
        grad_BTD, square = session.backward(
            frame.step,
            frame.micro,
            decode(frame.gradient, "gradient"),
            last=frame.last,
            tokens=frame.tokens,
        )
        return self._gradients(frame, grad_BTD, square, started)

    def _again(self, session: Session, frame: pb.GetGradients, started: float) -> pb.Gradients:
        grad_BTD, square = session.get_gradients(frame.step, frame.micro)
        return self._gradients(frame, grad_BTD, square, started)

    def _gradients(
        self, frame: pb.Backward | pb.GetGradients, grad: torch.Tensor, square: float, start: float
    ) -> pb.Gradients:
        return pb.Gradients(
            step=frame.step,
            micro=frame.micro,
            gradient=encode(grad, self._dtype),
            square_norm=square,
            seconds=time.perf_counter() - start,
        )

    def _apply(self, key: str, session: Session, frame: pb.Apply, traffic: _Traffic) -> pb.Applied:
        before = session.applied
        started = time.perf_counter()
        result = session.apply(
            frame.step,
            client_square_norm=frame.client_square_norm,
            tokens=frame.tokens,
            gradients=decode_named(frame.gradients),
        )
        seconds = time.perf_counter() - started
        # A step that came twice is reported once, one without an example of this client not at all.
        if session.applied > before and frame.tokens:
            self.on_step(
                StepReport(
                    key=key,
                    client=session.client,
                    step=frame.step,
                    steps=session.steps,
                    loss=frame.loss,
                    tokens=frame.tokens,
                    grad_norm=result.grad_norm,
                    lr=result.lr,
                    bytes_up=traffic.bytes_up,
                    bytes_down=traffic.bytes_down,
                    seconds={
                        "bottom": frame.seconds_bottom,
                        "network": frame.seconds_network,
                        "trunk": traffic.seconds + seconds,
                        "top": frame.seconds_top,
                    },
                )
            )
            # What this frame and its reply weigh belongs to the next step.
            traffic.bytes_up = traffic.bytes_down = 0
            traffic.seconds = -seconds
        return pb.Applied(
            step=frame.step,
            grad_norm=result.grad_norm,
            lr=result.lr,
            seconds=seconds,
            state=encode_named(result.state),
        )

    def _end_idle_sessions(self) -> None:
        """A client that fell silent must not hold a turn, a replica or a thread for ever."""
        limit = self._link.timeout * IDLE_SHARE
        while not self._stopped.wait(min(1.0, limit / 4)):
            now = time.monotonic()
            with self._lock:
                idle = [
                    call
                    for call, traffic in self._calls.items()
                    if traffic.waiting_since is not None and now - traffic.waiting_since > limit
                ]
            for call in idle:
                logger.warning("a client was silent for %g s: session ended", limit)
                call.cancel()


def _parse(raw: bytes) -> pb.ClientFrame:
    try:
        frame = pb.ClientFrame.FromString(raw)
    except DecodeError as error:
        raise TrunkError(f"a frame of {len(raw)} bytes is not a Graft frame: {error}") from error
    if frame.version != WIRE_VERSION:
        raise TrunkError(
            f"wire version {frame.version} came, version {WIRE_VERSION} is spoken here; run the "
            "same release of Graft on both sides",
            kind="version",
        )
    if frame.WhichOneof("body") is None:
        raise TrunkError("a frame without a body came")
    return frame


def _frame(traffic: _Traffic, **body: object) -> bytes:
    raw: bytes = pb.ServerFrame(version=WIRE_VERSION, **body).SerializeToString()  # type: ignore[arg-type]
    traffic.bytes_down += len(raw)
    return raw
