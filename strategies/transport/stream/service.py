"""The trunk engine behind gRPC: sessions, each over one bidirectional stream after another."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from flwr.app import Message
from flwr.serverapp import Grid

from conf.schema import Config, LinkConfig
from strategies.deadlines import silence, turn
from strategies.engine.engine import MAX_GRAPHS, TrunkEngine
from strategies.errors import TrunkError
from strategies.mail import LostStream, exchange, never
from strategies.transport import tickets
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.registry import find_codec
from strategies.transport.conversation import Conversation, StepReport
from strategies.transport.frames import failure_of, server_frame
from strategies.transport.plane import Limits
from strategies.transport.stream.bind import bind
from strategies.transport.stream.options import (
    CONNECTION_KEY,
    MAX_STREAMS,
    SESSION_KEY,
    STEPS_KEY,
    TOKEN_KEY,
    server_options,
)
from strategies.transport.tickets import Guest, Ticket

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Seat:
    """A guest's place in the open round, from its ticket to its good-bye."""

    guest: Guest
    secret: bytes
    connection: int = 0
    """The number of the last connection that was let in."""
    stream: grpc.ServicerContext | None = None
    talk: Conversation | None = None
    since: float | None = None
    """With a stream: since when it waits for the client. Without: since when there is none."""
    over: TrunkError | None = None
    """Why the session was given up, if it was: a client that comes back is told."""
    opening: threading.Lock = field(default_factory=threading.Lock)


class TrunkService:
    """Serves a `TrunkEngine` to the guests of the open round.

    A session whose stream broke keeps its state for `link.grace` seconds, in which its client may
    connect again; see `tickets` for what lets it in.

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
        codec = find_codec(link.dtype)
        self._private_key = tickets.new_key()
        self._seats: dict[str, _Seat] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._limit = int(link.max_frame_mb * 2**20)
        if engine.train.sync != "step":  # then frames hold activations and gradients only
            self._limit = min(self._limit, engine.largest_frame(codec.most_bytes))
        self._server = grpc.server(
            ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix="graft-session"),
            options=server_options(self._limit, link.grace),
            maximum_concurrent_rpcs=MAX_STREAMS,
        )
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("graft.Trunk", {"Session": handler}),)
        )
        self.certificate, port = bind(self._server, link)
        host = link.bind.rpartition(":")[0]
        self.address = link.advertise or f"{host}:{port}"

    @staticmethod
    def limits(config: Config) -> Limits:
        """A turn comes before the client that waits for it gives up."""
        return Limits(turn=turn(config.link.timeout), graphs=MAX_GRAPHS)

    def start(self) -> str:
        """Accept sessions; returns the address that clients connect to."""
        self._server.start()
        threading.Thread(target=self._end_lost_sessions, daemon=True, name="graft-lost").start()
        return self.address

    def ticket(self, guest: Guest) -> Ticket:
        """Admit a guest to one session of the open round.

        Raises
        ------
        ValueError
            If the guest's public key is none.
        """
        nonce = tickets.new_nonce()
        secret = tickets.session_secret(self._private_key, guest.public_key, nonce, guest.key)
        with self._lock:
            self._seats[guest.key] = _Seat(guest, secret)
        return Ticket(
            session=guest.key,
            address=self.address,
            nonce=nonce,
            trunk_key=tickets.public_half(self._private_key),
            certificate=self.certificate,
        )

    def broken(self, key: str) -> LostStream | None:
        """When and where session `key` lost its stream; None if it has one, or has not begun."""
        with self._lock:
            seat = self._seats.get(key)
            if seat is None or seat.talk is None or seat.talk.closed or seat.stream is not None:
                return None
            session = seat.talk.session
            assert seat.since is not None
            return LostStream(since=seat.since, done=session.applied, steps=session.steps)

    def sessions(self) -> int:
        """How many sessions are open."""
        with self._lock:
            return sum(
                seat.talk is not None and not (seat.over or seat.talk.closed)
                for seat in self._seats.values()
            )

    def exchange(
        self,
        grid: Grid,
        messages: Sequence[Message],
        keys: Mapping[int, str],
        *,
        timeout: float,
        enough: Callable[[], bool] = never,
    ) -> Iterator[Message]:
        """Bring the round's messages to the clients; see `Plane.exchange`."""
        return exchange(
            grid,
            messages,
            timeout=timeout,
            enough=enough,
            broken=lambda node: self.broken(keys[node]),
            lost_after=self._link.grace,
        )

    def end_round(self) -> None:
        """Withdraw all tickets and end the streams that are still open."""
        with self._lock:
            seats, self._seats = list(self._seats.values()), {}
            streams = [seat.stream for seat in seats if seat.stream is not None]
            for seat in seats:
                seat.over = seat.over or _round_over()
        for stream in streams:
            stream.cancel()

    def stop(self) -> None:
        """Refuse new sessions and end the open ones."""
        self._stopped.set()
        self._server.stop(grace=1.0).wait()

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        seat = self._let_in(metadata, context)
        if seat is None:
            self._engine.meter.refused()
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "no session is open to this token: it is not its node's, it was used before, or "
                "its round has ended",
            )
            return
        self._engine.meter.connected(again=seat.talk is not None)
        try:
            talk = self._open(seat, metadata)
            opened = pb.Opened(hidden_size=self._engine.hidden_size, steps=talk.session.steps)
            yield talk.frame(opened=opened)
            yield from self._converse(seat, talk, requests, context)
        except TrunkError as error:
            logger.warning("session %s: %s", seat.guest.key, error)
            self._give_up(seat, error)
            yield server_frame(failure=failure_of(error))
        except Exception as error:  # in an unknown state
            self._give_up(seat, TrunkError(f"the trunk failed: {error!r:.200}", kind="failed"))
            raise
        finally:
            self._part(seat, context)

    def _let_in(self, metadata: dict[str, str], context: grpc.ServicerContext) -> _Seat | None:
        """The seat that a connection's token is for; the session's earlier stream ends."""
        number = metadata.get(CONNECTION_KEY, "")
        connection = int(number) if number.isdecimal() and len(number) < 10 else 0
        with self._lock:
            seat = self._seats.get(metadata.get(SESSION_KEY, ""))
            # Somebody without a seat takes as long to be told.
            secret = seat.secret if seat else secrets.token_bytes(tickets.KEY_BYTES)
            fits = tickets.same(tickets.token(secret, connection), metadata.get(TOKEN_KEY, ""))
            if seat is None or not fits or connection <= seat.connection:
                return None
            before, seat.stream, seat.connection, seat.since = (
                seat.stream, context, connection, None,
            )  # fmt: skip
        if before is not None:
            before.cancel()
        return seat

    def _open(self, seat: _Seat, metadata: dict[str, str]) -> Conversation:
        """Open the session, or find it as an earlier stream has left it."""
        steps = metadata.get(STEPS_KEY, "")
        if not (steps.isdecimal() and len(steps) < 10):
            raise TrunkError(f"{STEPS_KEY} must be a whole number, got {steps[:20]!r}")
        guest = seat.guest
        with seat.opening:
            if seat.over:
                raise seat.over
            if seat.talk is None:
                session = self._engine.open(
                    guest.key, client=guest.client, steps=int(steps), cut=guest.cut
                )
                seat.talk = Conversation(
                    guest.key, session, self._link.dtype, self.on_step, limit=self._limit
                )
            return seat.talk

    def _converse(
        self,
        seat: _Seat,
        talk: Conversation,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> Iterator[bytes]:
        """Answer frames until the client leaves, falls silent, or has another stream."""
        while seat.stream is context:
            # Neither sending nor reading may hold a client up who does not read or send.
            self._wait(seat, context, time.monotonic())
            raw = _next(requests)
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

    def _wait(self, seat: _Seat, context: grpc.ServicerContext, since: float | None) -> None:
        with self._lock:
            if seat.stream is context:
                seat.since = since

    def _part(self, seat: _Seat, context: grpc.ServicerContext) -> None:
        """A stream has ended; its session waits for the next one."""
        with self._lock:
            if seat.stream is context:
                seat.stream, seat.since = None, time.monotonic()

    def _give_up(self, seat: _Seat, why: TrunkError) -> None:
        """End this session for good, and drop what it has under way."""
        seat.over = seat.over or why
        if seat.talk is not None:
            seat.talk.session.close()

    def _end_lost_sessions(self) -> None:
        """A client that fell silent or stays away must not hold a turn, a replica or a thread."""
        quiet, absence = silence(self._link.timeout), self._link.grace
        while not self._stopped.wait(min(1.0, quiet / 4, absence / 4)):
            self._look_for_lost(quiet, absence)

    def _look_for_lost(self, quiet: float, absence: float) -> None:
        """Apart from the loop, whose names would hold the last seat, replica and all."""
        now = time.monotonic()
        with self._lock:
            waiting = [
                (seat, seat.stream, now - seat.since)
                for seat in self._seats.values()
                if seat.since is not None and seat.talk is not None
                and not (seat.over or seat.talk.closed)
            ]  # fmt: skip
        for seat, stream, seconds in waiting:
            if seconds <= (absence if stream is None else quiet):
                continue
            how = "stayed away" if stream is None else "was silent"
            why = TrunkError(f"its client {how} for {seconds:.3g} s: given up", kind="lost")
            logger.warning("session %s: %s", seat.guest.key, why)
            self._give_up(seat, why)
            if stream is not None:
                stream.cancel()


def _round_over() -> TrunkError:
    return TrunkError("its round has ended", kind="closed")


def _next(requests: Iterator[bytes]) -> bytes | None:
    """The client's next frame; None if the stream has ended, which no client does on its own."""
    try:
        return next(requests, None)
    except grpc.RpcError:
        return None
