"""Sessions behind gRPC, each over one bidirectional stream after another, whatever they are for."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc

from conf.schema import LinkConfig
from strategies.engine.meter import Meter
from strategies.errors import TrunkError
from strategies.transport import tickets
from strategies.transport.frames import failure_of, server_frame
from strategies.transport.stream.ahead import Ahead
from strategies.transport.stream.bind import bind
from strategies.transport.stream.options import (
    CONNECTION_KEY,
    SESSION_KEY,
    TOKEN_KEY,
    server_options,
)
from strategies.transport.talk import Talk
from strategies.transport.tickets import Guest

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Seat:
    """A guest's place, from the secret it has to prove to its good-bye."""

    guest: Guest
    secret: bytes
    connection: int = 0
    """The number of the last connection that was let in."""
    stream: grpc.ServicerContext | None = None
    talk: Talk | None = None
    since: float | None = None
    """With a stream: since when it waits for the client. Without: since when there is none."""
    over: TrunkError | None = None
    """Why the session was given up, if it was: a client that comes back is told."""
    opening: threading.Lock = field(default_factory=threading.Lock)

    @property
    def open(self) -> bool:
        """Whether a session is at work here."""
        return self.talk is not None and not self.ended

    @property
    def ended(self) -> bool:
        """Whether a session was, and is no more."""
        return self.over is not None or (self.talk is not None and self.talk.closed)


class Host:
    """Lets guests in by their tokens, and gives their frames to their sessions.

    A session whose stream broke keeps its state for a while, in which its client may connect again;
    see `tickets` for what lets it in. A subclass says who has a seat, and opens sessions.

    Parameters
    ----------
    link : LinkConfig
        Address, TLS and deadlines.
    limit : int
        Largest frame that is accepted, bytes.
    streams : int
        Most streams at once; each takes a thread while it is open.
    meter : Meter
        Told of connections.
    strangers : str
        What somebody without a seat is told.
    quiet, absence : float
        Seconds after which a client is given up that sends nothing, or has no stream.
    key : bytes
        The trunk's private key; empty: a new one.

    Raises
    ------
    ValueError
        If the address cannot be bound or the certificate cannot be read.
    """

    def __init__(
        self,
        link: LinkConfig,
        *,
        limit: int,
        streams: int,
        meter: Meter,
        strangers: str,
        quiet: float,
        absence: float,
        key: bytes = b"",
    ) -> None:
        self._link, self._limit, self._meter = link, limit, meter
        self._strangers, self._quiet, self._absence = strangers, quiet, absence
        self._private_key = key or tickets.new_key()
        self._seats: dict[str, Seat] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._server = grpc.server(
            ThreadPoolExecutor(streams, thread_name_prefix="graft-session"),
            options=server_options(limit, link.grace),
            maximum_concurrent_rpcs=streams,
        )
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("graft.Trunk", {"Session": handler}),)
        )
        self.certificate, port = bind(self._server, link)
        host = link.bind.rpartition(":")[0]
        self.address = link.advertise or f"{host}:{port}"

    def start(self) -> str:
        """Accept sessions; returns the address that clients connect to."""
        self._server.start()
        threading.Thread(target=self._end_lost_sessions, daemon=True, name="graft-lost").start()
        return self.address

    def add(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Serve something else on the same port; before `start`."""
        self._server.add_generic_rpc_handlers(tuple(handlers))

    def sessions(self) -> int:
        """How many sessions are open."""
        with self._lock:
            return sum(seat.open for seat in self._seats.values())

    def stop(self) -> None:
        """Refuse new sessions and end the open ones."""
        self._stopped.set()
        self._server.stop(grace=1.0).wait()
        with self._lock:
            seats = [seat for seat in self._seats.values() if seat.open]
        for seat in seats:
            # Its thread may wait for another session, which nobody would give up any more.
            self._give_up(seat, TrunkError("the server has stopped", kind="closed"))

    def _find(self, session: str) -> Seat | None:
        """The seat of a session's name, known or new; None for a stranger."""
        return self._seats.get(session)

    def _talk(self, seat: Seat, metadata: Mapping[str, str]) -> Talk:
        """Open a seat's session; `TrunkError` if it cannot be."""
        raise NotImplementedError

    def _parted(self, seat: Seat) -> None:
        """A session was given up."""

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        seat = self._let_in(metadata, context)
        if seat is None:
            self._meter.refused()
            context.abort(grpc.StatusCode.UNAUTHENTICATED, self._strangers)
            return
        self._meter.connected(again=seat.talk is not None)
        try:
            talk = self._open(seat, metadata)
            yield talk.greeting()
            yield from self._converse(seat, talk, requests, context)
        except TrunkError as error:
            logger.log(self._level(error), "session %s: %s", seat.guest.key, error)
            self._give_up(seat, error)
            yield server_frame(failure=failure_of(error))
        except Exception as error:  # in an unknown state
            self._give_up(seat, TrunkError(f"the trunk failed: {error!r:.200}", kind="failed"))
            raise
        finally:
            self._part(seat, context)

    def _level(self, error: TrunkError) -> int:
        """How loudly the end of a session is told."""
        return logging.WARNING

    def _let_in(self, metadata: Mapping[str, str], context: grpc.ServicerContext) -> Seat | None:
        """The seat that a connection's token is for; the session's earlier stream ends."""
        number = metadata.get(CONNECTION_KEY, "")
        connection = int(number) if number.isdecimal() and len(number) < 10 else 0
        with self._lock:
            seat = self._find(metadata.get(SESSION_KEY, ""))
            # Somebody without a seat takes as long to be told.
            secret = seat.secret if seat else secrets.token_bytes(tickets.KEY_BYTES)
            fits = tickets.same(tickets.token(secret, connection), metadata.get(TOKEN_KEY, ""))
            if seat is None or not fits or connection <= seat.connection:
                return None
            self._seats[seat.guest.key] = seat
            before, seat.stream, seat.connection, seat.since = (
                seat.stream, context, connection, None,
            )  # fmt: skip
        if before is not None:
            before.cancel()
        return seat

    def _open(self, seat: Seat, metadata: Mapping[str, str]) -> Talk:
        """Open the session, or find it as an earlier stream has left it."""
        with seat.opening:
            if seat.over:
                raise seat.over
            if seat.talk is None:
                seat.talk = self._talk(seat, metadata)
            return seat.talk

    def _converse(
        self, seat: Seat, talk: Talk, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """Answer frames until the client leaves, falls silent, or has another stream."""
        ahead = Ahead(requests)
        try:
            yield from self._answer(seat, talk, ahead, context)
        finally:
            ahead.stop()

    def _answer(
        self, seat: Seat, talk: Talk, ahead: Ahead, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        while seat.stream is context:
            # Neither sending nor reading may hold a client up who does not read or send.
            self._wait(seat, context, time.monotonic())
            raw = ahead.next()
            self._wait(seat, context, None)
            if raw is None:
                logger.info("session %s: its stream broke", seat.guest.key)
                return
            reply = talk.answer(raw, lambda: seat.stream is context)
            if not reply:  # another stream has taken this one's place
                return
            self._wait(seat, context, time.monotonic())
            yield reply
            if talk.left:
                logger.info("session %s: its client left", seat.guest.key)
                self._give_up(seat, TrunkError("its client left", kind="closed"))
            if talk.closed or talk.left:
                return

    def _wait(self, seat: Seat, context: grpc.ServicerContext, since: float | None) -> None:
        with self._lock:
            if seat.stream is context:
                seat.since = since

    def _part(self, seat: Seat, context: grpc.ServicerContext) -> None:
        """A stream has ended; its session waits for the next one."""
        with self._lock:
            last = seat.stream is context
            if last:
                seat.stream, seat.since = None, time.monotonic()
        if last and seat.ended:
            self._parted(seat)

    def _give_up(self, seat: Seat, why: TrunkError) -> None:
        """End this session for good, and drop what it has under way."""
        seat.over = seat.over or why
        if seat.talk is not None:
            seat.talk.end()

    def _end_lost_sessions(self) -> None:
        """A client that fell silent or stays away must not hold a turn, a replica or a thread."""
        while not self._stopped.wait(min(1.0, self._quiet / 4, self._absence / 4)):
            self._look_for_lost()

    def _look_for_lost(self) -> None:
        """Apart from the loop, whose names would hold the last seat, replica and all."""
        now = time.monotonic()
        with self._lock:
            waiting = [
                (seat, seat.stream, now - seat.since)
                for seat in self._seats.values()
                if seat.since is not None and seat.open
            ]
        for seat, stream, seconds in waiting:
            if seconds <= (self._absence if stream is None else self._quiet):
                continue
            how = "stayed away" if stream is None else "was silent"
            why = self._lost(f"its client {how} for {seconds:.3g} s: given up")
            logger.log(self._level(why), "session %s: %s", seat.guest.key, why)
            self._end(seat, why)

    def _end(self, seat: Seat, why: TrunkError) -> None:
        """Give a session up, and end its stream."""
        self._give_up(seat, why)
        with self._lock:
            stream = seat.stream
        if stream is not None:
            stream.cancel()
        else:
            self._parted(seat)

    def _lost(self, words: str) -> TrunkError:
        """What a client is told that comes back too late."""
        return TrunkError(words, kind="lost")
