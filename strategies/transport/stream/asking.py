"""Questions over a stream that may break: kept as they were sent until they are answered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from strategies.deadlines import repeat
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.frames import Frame, client_frame, read_server_frame
from strategies.transport.link import Request
from strategies.transport.stream.channel import BROKEN, FULL
from strategies.transport.stream.connection import Connection


class Asking:
    """A session's questions to the trunk: one stream, or as many as it takes to bring them through.

    Frames that wait for their answers are kept as they were sent, oldest first. Those without one
    are sent again, over a new stream if the old one broke; the trunk does nothing twice.

    Parameters
    ----------
    connection : Connection
        The way to the trunk.
    timeout : float
        Seconds for an answer, over each stream.
    limit : int
        Largest frame, bytes.
    too_large : str
        What a frame that is larger exceeds, and what to do about it.
    """

    def __init__(
        self, connection: Connection, *, timeout: float, limit: int, too_large: str
    ) -> None:
        self._connection, self._timeout = connection, timeout
        self._limit, self._too_large = limit, too_large
        self._asked: list[Request] = []
        self._over = False
        self.bytes_up = self.bytes_down = 0
        self.trunk_seconds = 0.0

    @property
    def connections(self) -> int:
        """How many streams were tried so far."""
        return self._connection.number

    def open(self, seconds: float) -> pb.Opened:
        """Open the first stream; see `Connection.open`."""
        with self._ending_in_words():
            return self._connection.open(seconds)

    def close(self) -> None:
        """Say good-bye and end the stream; nothing is left to do after an error or a good-bye."""
        if self._over:
            return
        try:
            self.send(Request(client_frame(close=pb.Close()), "closed"))
            self.answer("closed")
        except TrunkError:
            self.abort()
            raise
        self._over = True
        self._connection.drop()

    def abort(self) -> None:
        """Leave before the end; nothing is left to do after a good-bye or an earlier call."""
        if not self._over:
            self._connection.leave(client_frame(close=pb.Close(early=True)))
        self._over = True

    def send(self, request: Request) -> None:
        """Send a frame, and keep it until it is answered."""
        if self._over:
            raise TrunkError("this link has ended", kind="closed")
        if len(request.raw) > self._limit:
            raise TrunkError(
                f"a frame of {len(request.raw) / 2**20:.3g} MiB exceeds {self._too_large}",
                kind="too-large",
            )
        self._asked.append(request)
        self._put(request.raw)

    def answer(self, kind: str) -> Request:
        """The first request of its kind, answered, whatever that takes."""
        request = next((each for each in self._asked if each.answer == kind), None)
        if request is None:
            raise RuntimeError(f"nothing was asked that '{kind}' would answer")
        with self._ending_in_words():
            self._wait_for(request)
        self._asked.remove(request)
        self.trunk_seconds += getattr(request.reply, "seconds", 0.0)
        return request

    def _put(self, raw: bytes) -> None:
        self.bytes_up += len(raw)
        self._connection.send(raw)

    def _wait_for(self, request: Request) -> None:
        """Receive until a request has its answer, within the deadline of each stream."""
        timeout, breaks = self._timeout, 0
        deadline = time.monotonic() + timeout
        while request.reply is None:
            if (left := deadline - time.monotonic()) <= 0:
                raise TrunkError(
                    f"the trunk at {self._connection.address} did not answer within {timeout:g} "
                    "s; raise link.timeout if it is only busy",
                    kind="timeout",
                )
            try:
                frame = self._receive(min(left, repeat(timeout)))
            except TrunkError as error:
                if error.kind in (BROKEN, FULL):
                    breaks += 1
                    self._connection.reopen(error, breaks)
                    deadline = time.monotonic() + timeout
                elif error.kind != "damaged":
                    raise
                frame = None
            if frame is None:
                self._repeat()
            else:
                self._take(frame)

    def _take(self, frame: Frame[pb.ServerFrame]) -> None:
        """Give a frame to the request that it answers; one that came twice answers none."""
        if frame.kind == "failure":
            return self._take_failure(frame.head.failure)
        for request in self._unanswered():
            if request.fits(frame):
                return request.take(frame)
        return None

    def _unanswered(self) -> list[Request]:
        return [request for request in self._asked if request.reply is None]

    def _repeat(self) -> None:
        """Ask again for all that has no answer, in the order of the first time."""
        for request in self._unanswered():
            self._put_again(request)

    def _put_again(self, request: Request) -> None:
        self._put(request.raw)

    def _take_failure(self, failure: pb.Failure) -> None:
        """Send again what did not arrive; `TrunkError` if the trunk refuses it."""
        error = TrunkError(failure.message, kind=failure.kind)
        if not error.passes:
            raise error
        if error.kind == "damaged":
            self._repeat()

    def _receive(self, timeout: float) -> Frame[pb.ServerFrame] | None:
        raw = self._connection.receive(timeout)
        if raw is None:
            return None
        self.bytes_down += len(raw)
        return read_server_frame(raw)

    @contextmanager
    def _ending_in_words(self) -> Iterator[None]:
        """An error ends the link, and says which trunk it is about."""
        try:
            yield
        except TrunkError as error:
            self.abort()
            if self._connection.address in str(error):
                raise
            raise TrunkError(
                f"the trunk at {self._connection.address}: {error}", kind=error.kind
            ) from error
