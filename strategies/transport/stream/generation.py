"""Trunks that generate, behind gRPC: a session is opened when a client comes for one."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from conf.schema import LinkConfig
from strategies.engine.meter import SILENT, Meter
from strategies.errors import TrunkError
from strategies.generation.session import GONE
from strategies.transport import tickets
from strategies.transport.codec.registry import crossings
from strategies.transport.generating import Engine, Generating
from strategies.transport.stream.host import Host, Seat
from strategies.transport.stream.options import FINGERPRINT_KEY, MODEL_KEY
from strategies.transport.tickets import Guest

logger = logging.getLogger(__name__)

STRANGERS = (
    "this access file opens nothing here: it is another server's, its client's key was replaced, "
    "or the connection was made before"
)
"""What somebody is told whose token opens nothing."""

STOPPING = "stopping"
"""The kind of error of a server that ends; another may take its place."""

SPARE_STREAMS = 16
"""Streams beside the sessions': of those that come back or are refused, and of health checks."""

SESSION = re.compile(r"[\w.-]{1,64}/[0-9a-f]{32}", re.ASCII)
"""A session's name: the client's, and 128 random bits."""


@dataclass(frozen=True, kw_only=True)
class Invited:
    """A client that may open sessions."""

    public_key: bytes
    nonce: bytes
    expires: float | None = None
    """Seconds of the epoch; None: never."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model whose trunk is served."""

    engine: Engine
    fingerprint: str
    """What a client's ends must be of."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How many sessions there may be, and for how long."""

    sessions: int = 64
    idle: float = 600.0
    """Seconds without a frame after which a session is ended."""
    rest: float = 5.0
    """Seconds without a frame after which a session may have to make room for another."""


@dataclass
class _Ended:
    """Names of sessions that were, which none may have again."""

    names: dict[bytes, str] = field(default_factory=dict)

    def add(self, name: str, why: str) -> None:
        self.names.setdefault(_digest(name), why)

    def why(self, name: str) -> str:
        return self.names.get(_digest(name), "")


class GenerationService(Host):
    """Serves trunks to whoever was invited.

    Parameters
    ----------
    offers : mapping
        Models by name; a client that names none gets the first.
    invited : mapping
        Clients by name.
    link : LinkConfig
        Address, TLS, largest frame, codec, and for how long a session without a stream is kept.
    key : bytes
        The private key that the clients' access files belong to.
    policy : Policy
        Most sessions, and how long they may rest.
    meter : Meter
        Told of the work.

    Raises
    ------
    ValueError
        If the address cannot be bound or the certificate cannot be read.
    """

    def __init__(
        self,
        offers: Mapping[str, Offer],
        invited: Mapping[str, Invited],
        link: LinkConfig,
        *,
        key: bytes,
        policy: Policy | None = None,
        meter: Meter = SILENT,
    ) -> None:
        self._offers, self._invited = dict(offers), dict(invited)
        self._policy = policy = policy or Policy()
        crossings(link.codec, 0)  # a name that nobody offers is refused at once
        self._ended = _Ended()
        self._nobody = tickets.public_half(tickets.new_key())
        self.draining = False
        super().__init__(
            link,
            limit=int(link.max_frame_mb * 2**20),
            streams=policy.sessions + SPARE_STREAMS,
            meter=meter,
            strangers=STRANGERS,
            quiet=policy.idle,
            absence=min(link.grace, policy.idle),
            key=key,
        )

    def drain(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Open no more sessions, and wait for the open ones to end; end those that do not.

        `hurry`: whether to wait no longer. Returns whether any had to be ended.
        """
        self.draining = True
        deadline = time.monotonic() + seconds
        while self.sessions() and time.monotonic() < deadline and not hurry():
            time.sleep(0.05)
        with self._lock:
            seats = [seat for seat in self._seats.values() if seat.open]
        for seat in seats:
            self._end(seat, TrunkError("the server has stopped", kind=STOPPING))
        return bool(seats)

    def _find(self, session: str) -> Seat | None:
        if (seat := self._seats.get(session)) is not None:
            return seat
        client = session.partition("/")[0]
        invited = self._invited.get(client)
        known, nonce = (
            (invited.public_key, invited.nonce) if invited else (self._nobody, self._nobody)
        )
        secret = tickets.session_secret(self._private_key, known, nonce, session)
        if invited is None or not SESSION.fullmatch(session):
            return None
        seat = Seat(Guest(key=session, client=client, public_key=known), secret)
        if why := self._ended.why(session):
            seat.over = TrunkError(why, kind=GONE)
        return seat

    def _talk(self, seat: Seat, metadata: Mapping[str, str]) -> Generating:
        if self.draining:
            raise TrunkError("the server is about to stop and opens no session", kind=STOPPING)
        self._check_expiry(seat.guest.client)
        offer = self._offer(metadata.get(MODEL_KEY, ""), metadata.get(FINGERPRINT_KEY, ""))
        while self.sessions() >= self._policy.sessions:
            if not self._retire_one():
                raise TrunkError(
                    f"{self._policy.sessions} sessions are open, which is the most "
                    "(graft serve --max-sessions): try again later",
                    kind="busy",
                )
        logger.info("session %s: opened", seat.guest.key)
        return Generating(
            seat.guest.key,
            offer.engine,
            codec=self._link.codec,
            limit=self._limit,
            meter=self._meter,
        )

    def _check_expiry(self, client: str) -> None:
        expires = self._invited[client].expires
        if expires is not None and time.time() > expires:
            raise TrunkError(
                f"the access of '{client}' has expired: ask whoever runs the server for a new "
                "access file (graft serve --days)",
                kind="expired",
            )

    def _offer(self, name: str, fingerprint: str) -> Offer:
        offer = self._offers.get(name) if name else next(iter(self._offers.values()))
        if offer is None:
            raise TrunkError(
                f"no model '{name[:64]}' is served here; there is {', '.join(self._offers)}",
                kind="model",
            )
        if fingerprint != offer.fingerprint:
            raise TrunkError(
                f"this client's ends are of another model than the trunk of '{name[:64]}' "
                f"(fingerprint {fingerprint[:16]!r}, the trunk's is {offer.fingerprint[:16]!r}): "
                "use ends of the same run or export",
                kind="model",
            )
        return offer

    def _retire_one(self) -> bool:
        """End the session that has rested longest; whether there was one."""
        for seat in self._resting():
            talk = _open_talk(seat)
            if talk is not None and talk.retire():
                self._end(seat, TrunkError("it rested while others waited for a seat", kind=GONE))
                return True
        return False

    def _resting(self) -> Iterator[Seat]:
        """Sessions that had no frame for a while, the longest rest first."""
        now = time.monotonic()
        with self._lock:
            resting = [
                (seat.since, seat)
                for seat in self._seats.values()
                if seat.open and seat.since is not None and now - seat.since >= self._policy.rest
            ]
        yield from (seat for _, seat in sorted(resting, key=lambda each: each[0]))

    def _parted(self, seat: Seat) -> None:
        why = str(seat.over) if seat.over is not None else "it was closed"
        logger.info("session %s: ended, %s", seat.guest.key, why)
        with self._lock:
            self._ended.add(seat.guest.key, why)
            self._seats.pop(seat.guest.key, None)

    def _level(self, error: TrunkError) -> int:
        return logging.INFO

    def _lost(self, words: str) -> TrunkError:
        return TrunkError(words, kind=GONE)


def _open_talk(seat: Seat) -> Generating | None:
    talk = seat.talk if seat.open else None
    assert talk is None or isinstance(talk, Generating)
    return talk


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()
