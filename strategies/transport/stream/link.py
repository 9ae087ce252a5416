"""A session over gRPC, as its client has it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from torch import Tensor

from conf.schema import LinkConfig
from strategies.deadlines import repeat
from strategies.engine.lane import StepResult
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.frames import client_frame, read_server_frame
from strategies.transport.link import Framed, Request
from strategies.transport.stream.channel import BROKEN, FULL
from strategies.transport.stream.connection import Connection
from strategies.transport.tickets import Ticket

FIRST_CONNECTION_SECONDS = 30.0
"""For a session's first stream, which may need the trunk to be copied."""


class GrpcLink(Framed):
    """A session over gRPC: one stream, or as many as the network takes to bring it through.

    Frames that wait for their answers are kept as they were sent, oldest first. Those without one
    are sent again, over a new stream if the old one broke; the trunk does nothing twice. If the
    answer to a `Backward` is missing it is asked for with `GetGradients`, which saves sending the
    gradient again.

    Parameters
    ----------
    ticket : Ticket
        Where the trunk is, and which session to open.
    node_key : bytes
        This node's private key, without which the ticket is of no use.
    steps : int
        Optimizer steps planned for this session; 0 to evaluate.
    config : LinkConfig
        Wire dtype, limits and deadlines.
    interceptors : sequence
        gRPC's, for whoever wants to watch or disturb the frames.

    Raises
    ------
    TrunkError
        In words, when the trunk cannot be reached, refuses, or does not answer in time.
    """

    def __init__(
        self,
        ticket: Ticket,
        node_key: bytes,
        *,
        steps: int,
        config: LinkConfig,
        interceptors: Sequence[grpc.StreamStreamClientInterceptor] = (),
    ) -> None:
        super().__init__(config, ticket.session)
        self._address, self._config = ticket.address, config
        self._asked: list[Request] = []
        self._limit = int(config.max_frame_mb * 2**20)
        self._over = False
        self.bytes_up = self.bytes_down = 0
        self.trunk_seconds = 0.0
        self._connection = Connection(
            ticket, node_key, steps=steps, config=config, interceptors=interceptors
        )
        with self._ending_in_words():
            opened = self._connection.open(min(FIRST_CONNECTION_SECONDS, config.timeout))
        self.hidden_size = opened.hidden_size

    @property
    def connections(self) -> int:
        """How many streams were tried so far."""
        return self._connection.number

    def computed(self) -> Tensor:
        """Wait for the trunk's output h2, on the CPU."""
        with self._ending_in_words():
            return self.read_activations(*self._answered("activations"))

    def gradients(self) -> tuple[Tensor, float]:
        """Wait for dL/dh1, on the CPU, and the squared norm of the trunk's gradient."""
        with self._ending_in_words():
            return self.read_gradients(*self._answered("gradients"))

    def applied(self) -> StepResult:
        """Wait for the result of the optimizer step."""
        with self._ending_in_words():
            return self.read_applied(self._answered("applied")[0])

    def close(self) -> None:
        """Say good-bye and end the stream; nothing is left to do after an error or a good-bye."""
        if self._over:
            return
        try:
            self.send(Request(client_frame(close=pb.Close()), "closed"))
            with self._ending_in_words():
                self._answered("closed")
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
                f"a frame of {len(request.raw) / 2**20:.3g} MiB exceeds link.max_frame_mb="
                f"{self._config.max_frame_mb:g}; raise it, or lower train.batch_size or "
                "data.context",
                kind="too-large",
            )
        self._asked.append(request)
        self._put(request.raw)

    def _put(self, raw: bytes) -> None:
        self.bytes_up += len(raw)
        self._connection.send(raw)

    def _answered(self, kind: str) -> tuple[Any, tuple[int, ...]]:
        """The answer to the first request of its kind, whatever it takes, and the shape asked."""
        request = next((each for each in self._asked if each.answer == kind), None)
        if request is None:
            raise RuntimeError(f"nothing was asked that '{kind}' would answer")
        self._wait_for(request)
        self._asked.remove(request)
        self.trunk_seconds += getattr(request.reply, "seconds", 0.0)
        return request.reply, request.shape

    def _wait_for(self, request: Request) -> None:
        """Receive until a request has its answer, within the deadline of each stream."""
        timeout, breaks = self._config.timeout, 0
        deadline = time.monotonic() + timeout
        while request.reply is None:
            if (left := deadline - time.monotonic()) <= 0:
                raise TrunkError(
                    f"the trunk at {self._address} did not answer within {timeout:g} s; raise "
                    "link.timeout if it is only busy",
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

    def _take(self, frame: pb.ServerFrame) -> None:
        """Give a frame to the request that it answers; one that came twice answers none."""
        kind = frame.WhichOneof("body")
        if kind == "failure":
            return self._take_failure(frame.failure)
        for request in self._unanswered():
            if request.fits(frame):
                request.reply = getattr(frame, kind)
                return None
        return None

    def _unanswered(self) -> list[Request]:
        return [request for request in self._asked if request.reply is None]

    def _repeat(self) -> None:
        """Ask again for all that has no answer, in the order of the first time."""
        for request in self._unanswered():
            if request.answer == "gradients":
                question = pb.GetGradients(step=request.step, micro=request.micro)
                self._put(client_frame(get_gradients=question))
            else:
                self._put(request.raw)

    def _take_failure(self, failure: pb.Failure) -> None:
        """Send again what did not arrive; `TrunkError` if the trunk refuses it."""
        error = TrunkError(failure.message, kind=failure.kind)
        if not error.passes:
            raise error
        if error.kind == "damaged":
            self._repeat()
        elif error.kind == "missing":
            for request in self._unanswered():
                place = (request.answer, request.step, request.micro)
                if place == ("gradients", failure.step, failure.micro):
                    self._put(request.raw)

    def _receive(self, timeout: float) -> pb.ServerFrame | None:
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
            if self._address in str(error):
                raise
            raise TrunkError(f"the trunk at {self._address}: {error}", kind=error.kind) from error
