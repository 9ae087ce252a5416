"""One gRPC stream to the trunk: frames out, frames in, and why it ended."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

import grpc

from strategies.errors import TrunkError
from strategies.transport import tickets
from strategies.transport.stream.options import (
    CONNECTION_KEY,
    MAX_STREAMS,
    METHOD,
    SESSION_KEY,
    STEPS_KEY,
    TOKEN_KEY,
    client_options,
)
from strategies.transport.tickets import Ticket

BROKEN = "broken"
"""The kind of error after which another stream may be tried."""

FULL = "full"
"""The kind of error of a trunk that serves as many as it can; it may have room later."""

LEAVE_SECONDS = 1.0
"""How long the trunk may take to notice that a client leaves."""

_LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
"""How streams end that the network, or the trunk's end of it, has let down."""


class Stream:
    """A connection of a session.

    Parameters
    ----------
    ticket : Ticket
        Where to, and whom to trust there.
    secret : bytes
        The session's.
    number : int
        Of this connection, from 1; its token serves once.
    steps : int
        Optimizer steps planned for the session.
    limit : int
        Largest frame that is accepted, bytes.
    grace : float
        Seconds for which a broken session is kept: how fast a dead connection must be noticed.
    interceptors : sequence
        gRPC's, for whoever wants to watch or disturb the frames.
    extra : sequence
        More metadata.
    """

    def __init__(
        self,
        ticket: Ticket,
        secret: bytes,
        *,
        number: int,
        steps: int,
        limit: int,
        grace: float,
        interceptors: Sequence[grpc.StreamStreamClientInterceptor] = (),
        extra: Sequence[tuple[str, str]] = (),
    ) -> None:
        options, certificate = client_options(limit, grace), ticket.certificate
        self._channel = (
            grpc.secure_channel(ticket.address, grpc.ssl_channel_credentials(certificate), options)
            if certificate
            else grpc.insecure_channel(ticket.address, options)
        )
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[bytes | TrunkError] = queue.SimpleQueue()
        channel = grpc.intercept_channel(self._channel, *interceptors)
        call = channel.stream_stream(METHOD)(
            iter(self._outbox.get, None),
            metadata=(
                (SESSION_KEY, ticket.session),
                (CONNECTION_KEY, str(number)),
                (TOKEN_KEY, tickets.token(secret, number)),
                (STEPS_KEY, str(steps)),
                *extra,
            ),
        )
        self._reader = threading.Thread(
            target=self._read, args=(call,), daemon=True, name="graft-link"
        )
        self._reader.start()

    def send(self, raw: bytes) -> None:
        """Send a frame; if the stream has ended, `receive` says so."""
        self._outbox.put(raw)

    def receive(self, timeout: float) -> bytes | None:
        """The next frame; None if none comes within `timeout` seconds.

        Raises
        ------
        TrunkError
            If the stream has ended: of kind `broken` or `full` if another one may be tried.
        """
        try:
            got = self._inbox.get(timeout=max(0.0, timeout))
        except queue.Empty:
            return None
        if isinstance(got, TrunkError):
            self._inbox.put(got)  # whoever asks again is told again
            raise got
        return got

    def leave(self, good_bye: bytes) -> None:
        """End the stream with a last frame, for which the trunk ends it, too."""
        self._outbox.put(good_bye)
        self._outbox.put(None)
        self._reader.join(LEAVE_SECONDS)
        self._channel.close()

    def drop(self) -> None:
        """End the stream at once: another one takes its place."""
        self._channel.close()  # first, or the end of the outbox would be taken for a good-bye
        self._outbox.put(None)

    def _read(self, call: Iterator[bytes]) -> None:
        """Move frames to the inbox, and say at its end why the stream ended."""
        try:
            for raw in call:
                self._inbox.put(raw)
        except grpc.RpcError as error:
            self._inbox.put(_reason(error))
        else:
            self._inbox.put(TrunkError("it closed the stream", kind=BROKEN))


def _reason(error: grpc.RpcError) -> TrunkError:
    """Why a stream ended. The error of a stream is its call, which has a code and details."""
    if not isinstance(error, grpc.Call):
        return TrunkError(str(error), kind=BROKEN)
    code, details = error.code(), error.details() or error.code().name
    if "larger than max" in details:
        return TrunkError(
            f"{details}; lower train.batch_size or data.context, or raise link.max_frame_mb",
            kind="too-large",
        )
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "limit exceeded" in details.lower():
        return TrunkError(
            f"it serves as many clients as it can, {MAX_STREAMS}, and had no room for this one; "
            "ask fewer in a round: lower federation.fraction_train and "
            f"federation.fraction_evaluate, or federation.min_clients ({details})",
            kind=FULL,
        )
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return TrunkError(details, kind="refused")
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return TrunkError(
            "it shows another certificate than the one that came with the ticket, or the access "
            f"file: something between it and this client answers in its place ({details})",
            kind="certificate",
        )
    if "Hostname Verification" in details:
        return TrunkError(
            "its certificate is for another name; set link.advertise to a name that "
            f"link.certificate holds ({details})",
            kind="certificate",
        )
    return TrunkError(details, kind=BROKEN if code in _LOST else "closed")
