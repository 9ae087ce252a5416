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

    Frames that wait for their answers are kept as they were sent, oldest first, and answers are
    taken in that order. What has no answer is sent again as it was: all of it, in order, if a frame
    did not arrive (the trunk serves none before those in front of it) or the stream broke; the
    oldest alone, if nothing came for a while. The trunk does nothing twice.

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
        # What was said last to be missing: the oldest request without an answer, and the number of
        # the frame that came instead of it.
        self._missed: tuple[Request | None, int] = None, 0
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
        """The next request, which must be of this kind, answered, whatever that takes."""
        request = self._asked[0] if self._asked else None
        if request is None or request.answer != kind:
            raise RuntimeError(f"'{kind}' would not answer what was asked next: {request}")
        with self._ending_in_words():
            self._wait_for(request)
        self._asked.pop(0)
        self.trunk_seconds += getattr(request.reply, "seconds", 0.0)
        return request

    def _put(self, raw: bytes) -> None:
        self.bytes_up += len(raw)
        self._connection.send(raw)

    def _wait_for(self, request: Request) -> None:
        """Receive until a request has its answer. Any answer is a sign of life: the deadline, which
        is that of each stream, counts from the last one."""
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
                    self._repeat()
                    self._missed = None, 0  # whatever else was under way is gone, too
                elif error.kind == "damaged":
                    self._put_again(self._unanswered()[0])
                else:
                    raise
                continue
            if frame is None:
                self._put_again(self._unanswered()[0])
            elif self._take(frame):
                breaks, deadline = 0, time.monotonic() + timeout

    def _take(self, frame: Frame[pb.ServerFrame]) -> bool:
        """Give a frame to the request that it answers; one that came twice answers none."""
        if frame.kind == "failure":
            self._take_failure(frame.head)
            return False
        for request in self._unanswered():
            if request.fits(frame):
                request.take(frame)
                return True
        return False

    def _unanswered(self) -> list[Request]:
        return [request for request in self._asked if request.reply is None]

    def _repeat(self, came: int = 0) -> None:
        """Send again all that has no answer, in the order of the first time.

        After a frame was lost, every later one that was under way with it is refused, too: `came`
        is its number. They come in order, so one that is not above the last one's was sent again,
        and something before it was lost again.
        """
        unanswered = self._unanswered()
        oldest, last = self._missed
        self._missed = unanswered[0], came
        if not came or oldest is not unanswered[0] or came <= last:
            for request in unanswered:
                self._put(request.raw)

    def _put_again(self, request: Request) -> None:
        """Ask again for one answer that is long in coming."""
        self._put(request.raw)

    def _take_failure(self, frame: pb.ServerFrame) -> None:
        """Send again what did not arrive; `TrunkError` if the trunk refuses it."""
        error = TrunkError(frame.failure.message, kind=frame.failure.kind)
        if not error.passes:
            raise error
        if error.kind in ("damaged", "gap", "missing"):
            self._repeat(frame.number if error.kind == "gap" else 0)

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
