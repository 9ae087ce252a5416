"""A trunk on a server, for a model that generates: its sessions survive the server's.

Legend: B rows, L positions that are cached, T new ones, D hidden size.
"""

from __future__ import annotations

import logging
import secrets
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import grpc
from torch import Tensor

from conf.schema import LinkConfig
from models.elsewhere import Crossed
from strategies.errors import TrunkError
from strategies.generation.session import GONE
from strategies.transport.history import Call, History
from strategies.transport.stream.generation import STOPPING
from strategies.transport.stream.options import FINGERPRINT_KEY, MODEL_KEY
from strategies.transport.stream.way import Way
from strategies.transport.tickets import Ticket

logger = logging.getLogger(__name__)

MAX_REBUILDS = 8
"""Times that the trunk may lose a session before one call is answered."""

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds before a server that has stopped is tried again."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a trunk is, and as whom it is asked."""

    ticket: Ticket
    """Of no session yet."""
    client: str
    key: bytes
    """The client's private key."""
    model: str = ""
    fingerprint: str = ""
    link: LinkConfig = field(default_factory=LinkConfig)
    """`timeout`: seconds for an answer. `grace`: for a server that is out of reach."""
    interceptors: Sequence[grpc.StreamStreamClientInterceptor] = ()


class StreamTrunk:
    """Opens sessions on a trunk that is on a server.

    Parameters
    ----------
    place : Place
        Where it is.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._sessions: weakref.WeakSet[StreamSession] = weakref.WeakSet()

    @property
    def address(self) -> str:
        """Where the trunk is, as host and port."""
        return self._place.ticket.address

    def open(self) -> StreamSession:
        """A session with nothing cached; the server hears of it with its first positions."""
        session = StreamSession(self._place)
        self._sessions.add(session)
        return session

    def close(self) -> None:
        """Leave all sessions."""
        for session in list(self._sessions):
            session.close()

    def load(self) -> tuple[int, int, float]:
        """Sessions that are open there, the bytes that they take, and the longest last wait."""
        ways = [session._way for session in list(self._sessions)]
        there = [way for way in ways if way is not None]
        waits = [way.queued for way in there]
        return len(there), sum(way.cache_bytes for way in there), max(waits, default=0.0)

    def check(self) -> None:
        """Connect once; `TrunkError` in words if the trunk cannot be used."""
        StreamSession(self._place).greet()


class StreamSession:
    """One cache on the trunk, and everything that it was made of.

    If the trunk has lost it (its server was started again, had to make room, or cannot set back so
    far), another one is begun there with the same positions.
    """

    def __init__(
        self, place: Place, history: History | None = None, parent: StreamSession | None = None
    ) -> None:
        self._place, self._history = place, history or History()
        self._way: Way | None = None
        self._parent = parent
        self._forks: weakref.WeakSet[StreamSession] = weakref.WeakSet()
        if parent is not None:
            parent._forks.add(self)

    def greet(self) -> None:
        """Open a stream, and leave."""
        self._opened().abort()
        self._way = None

    def forward(
        self,
        h_BTD: Tensor,
        *,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        rows: Sequence[int] = (),
        length: int = 0,
        keep: bool = True,
    ) -> Crossed:
        """Run the trunk on new positions; see `models.elsewhere.RemoteSession`."""
        call = Call(
            h_BTD=h_BTD.detach().cpu(),
            mask_BT=mask_BT,
            positions_BT=positions_BT,
            rows=tuple(rows),
            length=length,
            keep=keep,
        )
        self._let_forks_go(call)
        for rebuilt in range(MAX_REBUILDS + 1):
            try:
                crossed = self._crossed(call)
                break
            except TrunkError as error:
                self._forget()
                if error.kind not in (GONE, STOPPING) or rebuilt == MAX_REBUILDS:
                    raise
                logger.info("the trunk has lost a session (%s): begun anew", error)
            except BaseException:
                self._forget()  # nobody knows what the trunk has seen
                raise
        self._history = self._history.after(call)
        return crossed

    def fork(self) -> StreamSession:
        """A session that begins with what this one has cached; the server hears of it later."""
        held = self if self._way is not None else self._parent
        return StreamSession(self._place, self._history, held)

    def close(self) -> None:
        """Let the trunk forget it."""
        self._forget()
        self._history, self._parent = History(), None

    def _let_forks_go(self, call: Call) -> None:
        """Forks that have sent nothing yet cannot begin with what is about to be forgotten."""
        for fork in list(self._forks):
            if fork._way is not None or fork._parent is not self:
                self._forks.discard(fork)
            elif call.rows or call.length < fork._history.length:
                fork._parent = None

    def _crossed(self, call: Call) -> Crossed:
        """Send a call, after what the trunk lacks."""
        sums = Crossed(call.h_BTD, trips=0)
        if self._way is None and self._history.length and self._parent is None:
            way = self._opened()
            kept = self._history.chosen(call.rows, call.length)
            for before in kept.calls():
                sums = _added(sums, way.forward(before))
            call = replace(call, rows=())
        way = self._opened()
        parent, self._parent = self._parent, None
        name = parent._way.session if parent is not None and parent._way is not None else ""
        if parent is not None and not name:
            raise TrunkError("what this session begins with is no more", kind=GONE)
        # Over what is cached the trunk only goes on; the next call sets it back.
        call = replace(call, keep=call.keep or call.length > 0)
        return _added(sums, way.forward(call, fork=name))

    def _opened(self) -> Way:
        """The way to the trunk; while the server has stopped, another one is waited for."""
        if self._way is not None:
            return self._way
        link = self._place.link
        deadline, pause = time.monotonic() + link.grace, FIRST_PAUSE
        while True:
            try:
                self._way = self._new_way()
                return self._way
            except TrunkError as error:
                left = deadline - time.monotonic()
                if error.kind != STOPPING:
                    raise
                if left <= 0:
                    raise TrunkError(str(error), kind="stopped") from error
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _new_way(self) -> Way:
        place = self._place
        session = f"{place.client}/{secrets.token_hex(16)}"
        return Way(
            ticket=replace(place.ticket, session=session),
            key=place.key,
            link=place.link,
            extra=((MODEL_KEY, place.model), (FINGERPRINT_KEY, place.fingerprint)),
            interceptors=place.interceptors,
        )

    def _forget(self) -> None:
        """Leave the session on the trunk; the history stays."""
        way, self._way = self._way, None
        if way is not None:
            way.abort()


def _added(sums: Crossed, crossed: Crossed) -> Crossed:
    return Crossed(
        crossed.h_BTD,
        seconds=sums.seconds + crossed.seconds,
        bytes_up=sums.bytes_up + crossed.bytes_up,
        bytes_down=sums.bytes_down + crossed.bytes_down,
        trips=sums.trips + crossed.trips,
    )
