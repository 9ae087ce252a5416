"""The trunk engine behind gRPC: the sessions of a run's rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from conf.schema import Config, LinkConfig
from strategies.deadlines import silence, turn
from strategies.engine.engine import MAX_GRAPHS, TrunkEngine
from strategies.errors import TrunkError
from strategies.mail import LostStream, exchange, never
from strategies.transport import tickets
from strategies.transport.cache import Cache
from strategies.transport.codec.registry import crossings
from strategies.transport.conversation import Conversation, StepReport
from strategies.transport.plane import Limits
from strategies.transport.stream.host import Host, Seat
from strategies.transport.stream.options import MAX_STREAMS, STEPS_KEY
from strategies.transport.tickets import Guest, Ticket

STRANGERS = (
    "no session is open to this token: it is not its node's, it was used before, or its round has "
    "ended"
)
"""What somebody is told whose token opens nothing."""


class TrunkService(Host):
    """Serves a `TrunkEngine` to the guests of the open round.

    A session whose stream broke keeps its state for `link.grace` seconds.

    Parameters
    ----------
    engine : TrunkEngine
        What the sessions drive.
    link : LinkConfig
        Address, TLS, limits, deadlines and the codecs of tensors on the wire.
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
        self._engine, self.on_step = engine, on_step
        self._caches: dict[str, Cache] = {}
        codecs, limit = crossings(link.codec, 0), int(link.max_frame_mb * 2**20)
        if engine.train.sync != "step":  # then frames hold activations and gradients only
            limit = min(limit, engine.largest_frame(codecs.most_bytes))
        super().__init__(
            link,
            limit=limit,
            streams=MAX_STREAMS,
            meter=engine.meter,
            strangers=STRANGERS,
            quiet=silence(link.timeout),
            absence=link.grace,
        )

    @staticmethod
    def limits(config: Config) -> Limits:
        """A turn comes before the client that waits for it gives up."""
        return Limits(turn=turn(config.link.timeout), graphs=MAX_GRAPHS)

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
            self._seats[guest.key] = Seat(guest, secret)
        return Ticket(
            session=guest.key,
            address=self.address,
            nonce=nonce,
            trunk_key=tickets.public_half(self._private_key),
            seed=self._engine.codec_seed(guest.client),
            certificate=self.certificate,
        )

    def broken(self, key: str) -> LostStream | None:
        """When and where session `key` lost its stream; None if it has one, or has not begun."""
        with self._lock:
            seat = self._seats.get(key)
            if seat is None or seat.talk is None or seat.talk.closed or seat.stream is not None:
                return None
            assert isinstance(seat.talk, Conversation)
            session = seat.talk.session
            assert seat.since is not None
            return LostStream(since=seat.since, done=session.applied, steps=session.steps)

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

    def _talk(self, seat: Seat, metadata: Mapping[str, str]) -> Conversation:
        steps, guest = metadata.get(STEPS_KEY, ""), seat.guest
        if not (steps.isdecimal() and len(steps) < 10):
            raise TrunkError(f"{STEPS_KEY} must be a whole number, got {steps[:20]!r}")
        session = self._engine.open(guest.key, client=guest.client, steps=int(steps), cut=guest.cut)
        return Conversation(
            guest.key,
            session,
            self._link.codec,
            self.on_step,
            limit=self._limit,
            cache=self._cache(guest.client),
        )

    def _cache(self, client: str) -> Cache | None:
        """Of a client's activations; it lasts as long as the run, or this process."""
        if not self._link.cache_mb:
            return None
        with self._lock:
            return self._caches.setdefault(client, Cache(int(self._link.cache_mb * 2**20)))


def _round_over() -> TrunkError:
    return TrunkError("its round has ended", kind="closed")
