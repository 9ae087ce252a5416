"""The trunk engine behind gRPC: one bidirectional stream per session."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc

from conf.schema import LinkConfig
from models import Cut
from strategies.errors import TrunkError
from strategies.session import Session
from strategies.transport import trunk_pb2 as pb
from strategies.transport.certificates import is_loopback, self_signed
from strategies.transport.codec import WIRE_DTYPES
from strategies.transport.conversation import Conversation, StepReport, server_frame
from strategies.trunk import TrunkEngine

logger = logging.getLogger(__name__)

METHOD = "/graft.Trunk/Session"
TOKEN_KEY, CLIENT_KEY, STEPS_KEY = "graft-token", "graft-client", "graft-steps"
IDLE_SHARE, TURN_SHARE = 0.5, 0.75
"""Of `link.timeout`, which a client waits for a reply: how long the trunk waits for a client's next
frame, and for a turn. In this order, so that a dead client's turn is free before others give up."""

MAX_SESSIONS = 256
"""Streams served at once; each takes a thread while it is open."""


@dataclass(eq=False)
class _Call:
    """One stream, and since when it waits for its client."""

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
        self._calls: dict[grpc.ServicerContext, _Call] = {}
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

    def ticket(self, key: str, cut: Cut | None = None) -> dict[str, str | bytes]:
        """What a client needs to open session `key`; see `admit`."""
        return {
            "address": self.address,
            "token": self.admit(key, cut),
            "certificate": self.certificate,
        }

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
        call = _Call()
        with self._lock:
            self._calls[context] = call
        talk: Conversation | None = None
        try:
            session = self._open(str(key), metadata)
            talk = Conversation(str(key), session, self._dtype, self.on_step)
            opened = pb.Opened(hidden_size=self._engine.hidden_size, steps=session.steps)
            yield talk.frame(opened=opened)
            yield from self._converse(talk, requests, call)
        except TrunkError as error:
            logger.warning("session %s: %s", key, error)
            yield server_frame(failure=pb.Failure(kind=error.kind, message=str(error)))
        finally:
            with self._lock:
                self._calls.pop(context, None)
                if talk is not None and not talk.closed and key in self._cuts:
                    self._broken[str(key)] = Broken(
                        since=time.monotonic(), done=talk.session.applied, steps=talk.session.steps
                    )
            if talk is not None:
                talk.session.close()

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
        self, talk: Conversation, requests: Iterator[bytes], call: _Call
    ) -> Iterator[bytes]:
        """Answer frames until the client closes or falls silent."""
        while not talk.closed:
            # Neither sending nor reading may hold a client up who does not read or send.
            call.waiting_since = time.monotonic()
            raw = next(requests, None)
            call.waiting_since = None
            if raw is None:
                return
            reply = talk.answer(raw)
            call.waiting_since = time.monotonic()
            yield reply

    def _end_idle_sessions(self) -> None:
        """A client that fell silent must not hold a turn, a replica or a thread for ever."""
        limit = self._link.timeout * IDLE_SHARE
        while not self._stopped.wait(min(1.0, limit / 4)):
            now = time.monotonic()
            with self._lock:
                idle = [
                    context
                    for context, call in self._calls.items()
                    if call.waiting_since is not None and now - call.waiting_since > limit
                ]
            for context in idle:
                logger.warning("a client was silent for %g s: session ended", limit)
                context.cancel()
