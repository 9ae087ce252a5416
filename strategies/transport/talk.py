"""Frames of one session in, frames out: what holds whatever the session is for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from strategies.engine.meter import Meter
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.frames import Frame, failure_of, read_client_frame, server_frame
from strategies.transport.payload import Parcel

PATIENCE = 0.2
"""Seconds between two looks whether a frame that waits is still wanted."""

MAX_DAMAGED = 16
"""Damaged frames in a row after which a session is given up."""


class Talk:
    """What the trunk answers to the frames of one session.

    A frame that comes again is answered with the same bytes and done once, so that a client may
    repeat whatever was not answered. One thread at a time is served: a stream that broke may still
    be at work when the next one begins.

    Parameters
    ----------
    meter : Meter
        Told of bytes, frames and failures.
    limit : int
        Largest frame, bytes.
    advice : str
        What to do about a frame that is larger.
    """

    def __init__(self, meter: Meter, limit: int, advice: str) -> None:
        self._meter, self._limit, self._advice = meter, limit, advice
        self._serving = threading.Lock()
        self._damaged = 0
        # What has moved, and the trunk's own time, since a subclass last looked.
        self._bytes_up = self._bytes_down = 0
        self._seconds = 0.0
        self.closed = self.left = False

    def answer(self, raw: bytes, wanted: Callable[[], bool] = lambda: True) -> bytes:
        """Answer one frame.

        Parameters
        ----------
        raw : bytes
            The frame.
        wanted : callable
            Whether anybody still waits for the answer, asked while an earlier frame is at work; if
            not, the frame is left alone and the answer is empty.

        Raises
        ------
        TrunkError
            In words, if it cannot be served and the session is of no more use.
        """
        while not self._serving.acquire(timeout=PATIENCE):
            if not wanted():
                return b""
        try:
            self._bytes_up += len(raw)
            self._meter.received(len(raw))
            started = time.perf_counter()
            reply = self._reply_or_failure(raw, started)
            self._seconds += time.perf_counter() - started
            self._check_progress()
            self._count_sent(reply)
            return reply
        finally:
            self._serving.release()

    def greeting(self) -> bytes:
        """The frame that a stream begins with, counted."""
        raw = server_frame(opened=self.opened())
        self._count_sent(raw)
        return raw

    def opened(self) -> pb.Opened:
        """What the client is told first."""
        raise NotImplementedError

    def end(self) -> None:
        """Give up what the session holds."""
        raise NotImplementedError

    def _again(self, frame: pb.ClientFrame, raw: bytes) -> bytes | None:
        """The reply to a frame that came before, byte for byte; None if it did not."""
        raise NotImplementedError

    def _serve(
        self, frame: Frame[pb.ClientFrame], parcel: Parcel, started: float
    ) -> dict[str, Any]:
        """Do what a frame asks for; returns the body of the reply, whose tensors are put into the
        parcel."""
        raise NotImplementedError

    def _keep(self, frame: pb.ClientFrame, raw: bytes, reply: bytes) -> None:
        """Keep a reply that may be asked for again."""
        raise NotImplementedError

    def _check_progress(self) -> None:
        """Refuse a client that only repeats itself where it would hold others up."""

    def _failure(self, error: TrunkError, frame: pb.ClientFrame) -> pb.Failure:
        """What is said of a frame that failed while the session goes on."""
        return failure_of(error)

    def _reply_or_failure(self, raw: bytes, started: float) -> bytes:
        if len(raw) > self._limit:
            raise TrunkError(
                f"a frame of {len(raw)} bytes came, at most {self._limit} are accepted; "
                f"{self._advice}",
                kind="too-large",
            )
        head = pb.ClientFrame()
        try:
            frame = read_client_frame(raw)
            head, self._damaged = frame.head, 0
            reply = self._again(head, raw)
            if reply is None:
                with self._meter.frame(frame.kind):
                    parcel = Parcel()
                    answer = self._serve(frame, parcel, started)
                    reply = server_frame(parcel, number=head.number, **answer)
                self._keep(head, raw, reply)
            return reply
        except TrunkError as error:
            self._meter.failed(error.kind)
            if not error.passes:
                raise
            self._damaged += error.kind == "damaged"
            if self._damaged > MAX_DAMAGED:
                raise TrunkError(f"{MAX_DAMAGED} frames in a row: {error}", kind="order") from error
            return server_frame(failure=self._failure(error, head), number=head.number)

    def _count_sent(self, raw: bytes) -> None:
        self._bytes_down += len(raw)
        self._meter.sent(len(raw))
