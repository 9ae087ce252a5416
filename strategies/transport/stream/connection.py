"""A session's way to the trunk: one stream after another, for as long as the trunk keeps it."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from conf.schema import LinkConfig
from strategies.errors import TrunkError
from strategies.transport import tickets
from strategies.transport import trunk_pb2 as pb
from strategies.transport.certificates import validity_error
from strategies.transport.frames import read_server_frame, refuse_failure
from strategies.transport.stream.channel import BROKEN, FULL, Stream
from strategies.transport.tickets import Ticket

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before another attempt to connect: doubled each time, within bounds."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """What is said, and how loudly, where a trunk cannot be reached."""

    lost: str = (
        "link.grace={seconds:g} s did not bring it back; the server has stopped or cannot be "
        "reached. A stopped run goes on with resume"
    )
    unreachable: str = (
        "check that link.advertise (or link.bind) is an address this client can reach, that its "
        "port is open, and that link.tls is the same on both sides"
    )
    breaks: int = logging.WARNING
    """The level at which a broken stream is told."""


TRAINING = Words()

MAX_BREAKS = 10
"""Streams that may break before one question is answered."""


class Connection:
    """Opens streams to a session, each with the next number and its token.

    Parameters
    ----------
    ticket : Ticket
        Where the trunk is, and which session to open.
    node_key : bytes
        This node's private key.
    steps : int
        Optimizer steps planned for the session.
    config : LinkConfig
        Limits and deadlines.
    interceptors : sequence
        gRPC's, for whoever wants to watch or disturb the frames.
    extra : sequence
        More metadata of each stream.
    words : Words
        What is said of a trunk that cannot be reached.

    Raises
    ------
    TrunkError
        Of kind `clock`, if the trunk's certificate is not valid by this machine's.
    """

    def __init__(
        self,
        ticket: Ticket,
        node_key: bytes,
        *,
        steps: int,
        config: LinkConfig,
        interceptors: Sequence[grpc.StreamStreamClientInterceptor] = (),
        extra: Sequence[tuple[str, str]] = (),
        words: Words = TRAINING,
    ) -> None:
        if ticket.certificate and (error := validity_error(ticket.certificate)):
            raise TrunkError(error, kind="clock")
        self._ticket, self._steps, self._config = ticket, steps, config
        self._secret = tickets.session_secret(
            node_key, ticket.trunk_key, ticket.nonce, ticket.session
        )
        self._interceptors, self._extra, self._words = interceptors, extra, words
        self.address = ticket.address
        self._jitter = random.Random()  # of its own: training must not notice
        self.stream: Stream | None = None
        self.number = 0
        """Streams that were tried so far."""

    def send(self, raw: bytes) -> None:
        """Send a frame over the stream there is."""
        assert self.stream is not None
        self.stream.send(raw)

    def receive(self, timeout: float) -> bytes | None:
        """The next frame, see `Stream.receive`."""
        assert self.stream is not None
        return self.stream.receive(timeout)

    def leave(self, good_bye: bytes) -> None:
        """End the stream with a last frame, if there is one."""
        if self.stream is not None:
            self.stream.leave(good_bye)

    def drop(self) -> None:
        """End the stream at once, if there is one."""
        if self.stream is not None:
            self.stream.drop()

    def reopen(self, why: TrunkError, breaks: int) -> None:
        """Open another stream to the session, within the time for which the trunk keeps it.

        Parameters
        ----------
        why : TrunkError
            What broke the last one.
        breaks : int
            How often that has happened since the client last had an answer.

        Raises
        ------
        TrunkError
            Of kind `lost`, if the trunk cannot be reached; of another, if it refuses.
        """
        address, grace = self._ticket.address, self._config.grace
        if breaks > MAX_BREAKS:
            raise TrunkError(
                f"the stream to the trunk at {address} broke {breaks} times before one question "
                f"was answered, the last time because of this: {why}",
                kind="lost",
            )
        logger.log(
            self._words.breaks,
            "the stream to the trunk at %s broke (%s): connecting again",
            address,
            why,
        )
        before = self.number
        try:
            self.open(grace)
        except TrunkError as error:
            if error.kind != "unreachable":
                raise
            raise TrunkError(
                f"the stream to the trunk at {address} broke ({why}), and {self.number - before} "
                f"attempts within {self._words.lost.format(seconds=grace)}",
                kind="lost",
            ) from error

    def open(self, seconds: float) -> pb.Opened:
        """Open a stream, as often as it takes: exponential back-off with jitter, bounded.

        Raises
        ------
        TrunkError
            Of kind `unreachable` or `full` after `seconds`; of another, if the trunk refuses.
        """
        deadline = time.monotonic() + seconds
        pause, wait = FIRST_PAUSE, max(0.25, seconds / 4)
        why = TrunkError("no answer", kind=BROKEN)
        while True:
            self.drop()
            try:
                if opened := self._greeted(min(wait, deadline - time.monotonic())):
                    return opened
            except TrunkError as error:
                if error.kind not in (BROKEN, FULL, "damaged"):
                    raise
                why = error
            left = deadline - time.monotonic()
            if left <= 0 and why.kind == FULL:
                raise why
            if left <= 0:
                raise TrunkError(
                    f"no trunk answers at {self.address}; {self._words.unreachable} ({why})",
                    kind="unreachable",
                )
            time.sleep(min(left, pause * self._jitter.uniform(0.5, 1.0)))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _greeted(self, seconds: float) -> pb.Opened | None:
        """Try one stream; None if the trunk says nothing in time."""
        self.number += 1
        self.stream = Stream(
            self._ticket,
            self._secret,
            number=self.number,
            steps=self._steps,
            limit=int(self._config.max_frame_mb * 2**20),
            grace=self._config.grace,
            interceptors=self._interceptors,
            extra=self._extra,
        )
        raw = self.stream.receive(seconds)
        return None if raw is None else refuse_failure(read_server_frame(raw)).head.opened
