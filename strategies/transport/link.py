"""A client's end of the data plane."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from torch import Tensor

from conf.schema import LinkConfig
from strategies.deadlines import repeat
from strategies.engine.lane import StepResult
from strategies.engine.session import Session
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.tensors import (
    WIRE_DTYPES,
    decode,
    decode_named,
    encode,
    encode_mask,
    encode_named,
    shape_of,
)
from strategies.transport.frames import client_frame, read_server_frame
from strategies.transport.stream.channel import BROKEN
from strategies.transport.stream.connection import Connection
from strategies.transport.tickets import Ticket

FIRST_CONNECTION_SECONDS = 30.0
"""For a session's first stream, which may need the trunk to be copied."""


@dataclass(frozen=True, kw_only=True)
class StepCounters:
    """What a client tells of a step besides gradients: scalars only."""

    client_square_norm: float
    tokens: int
    loss: float = 0.0
    seconds_bottom: float = 0.0
    seconds_network: float = 0.0
    seconds_top: float = 0.0


class Link(Protocol):
    """The trunk as a client sees it. `apply` only sends; `applied` waits for its result, so that
    both sides take their optimizer steps at the same time."""

    bytes_up: int
    bytes_down: int
    trunk_seconds: float

    def compute(self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor: ...

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor, *, last: bool, tokens: int = 0
    ) -> tuple[Tensor, float]: ...

    def apply(
        self, step: int, counters: StepCounters, gradients: Mapping[str, Tensor] | None = None
    ) -> None: ...

    def applied(self) -> StepResult: ...

    def close(self) -> None: ...


class LocalLink:
    """A session of an engine in this process: no wire, no copies. For tests and baselines."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._result: StepResult | None = None
        self.bytes_up = self.bytes_down = 0
        self.trunk_seconds = 0.0
        self.compute = session.compute
        self.backward = session.backward

    def apply(
        self, step: int, counters: StepCounters, gradients: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take the step at once."""
        self._result = self._session.apply(
            step,
            client_square_norm=counters.client_square_norm,
            tokens=counters.tokens,
            gradients=gradients,
        )

    def applied(self) -> StepResult:
        """The result of the last `apply`."""
        if self._result is None:
            raise RuntimeError("applied() without apply()")
        return self._result

    def close(self) -> None:
        """Leave the session; its replica waits for the end of the round."""
        self._session.close()


@dataclass(frozen=True)
class _Request:
    """A frame that waits for its answer, and how that is known from others."""

    raw: bytes
    answer: str
    step: int = 0
    micro: int = 0

    def fits(self, frame: pb.ServerFrame) -> bool:
        """Whether a frame is the answer."""
        kind = frame.WhichOneof("body")
        if kind != self.answer:
            return False
        body = getattr(frame, kind)
        if kind in ("opened", "closed"):
            return True
        return body.step == self.step and getattr(body, "micro", 0) == self.micro


class GrpcLink:
    """A session over gRPC: one stream, or as many as the network takes to bring it through.

    At most one frame waits for its answer. A frame without one is sent again, over a new stream if
    the old one broke; the trunk does nothing twice. If the answer to a `Backward` is missing it is
    asked for with `GetGradients`, which saves sending the gradient again.

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
        self._address, self._config = ticket.address, config
        self._dtype = WIRE_DTYPES[config.dtype]
        self._limit = int(config.max_frame_mb * 2**20)
        self._outstanding: _Request | None = None
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

    def compute(self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Send activations (B, T, D) through the trunk; see `Session.compute`."""
        frame = pb.Compute(step=step, micro=micro, activations=encode(h_BTD, self._dtype))
        if mask_BT is not None:
            frame.mask.CopyFrom(encode_mask(mask_BT))
        reply = self._ask(_Request(client_frame(compute=frame), "activations", step, micro))
        return self._expect(reply.activations, "activations", h_BTD)

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor, *, last: bool, tokens: int = 0
    ) -> tuple[Tensor, float]:
        """Send dL/dh2 back through the trunk, get dL/dh1; see `Session.backward`."""
        gradient = encode(grad_BTD, self._dtype)
        frame = pb.Backward(step=step, micro=micro, gradient=gradient, last=last, tokens=tokens)
        reply = self._ask(_Request(client_frame(backward=frame), "gradients", step, micro))
        return self._expect(reply.gradient, "gradient", grad_BTD), reply.square_norm

    def get_gradients(self, step: int, micro: int) -> tuple[Tensor, float]:
        """Fetch the result of a `backward` again; `TrunkError` if the trunk keeps none."""
        self._send(self._question(step, micro))
        reply = self._answer()
        return decode(reply.gradient, "gradient"), reply.square_norm

    def apply(
        self, step: int, counters: StepCounters, gradients: Mapping[str, Tensor] | None = None
    ) -> None:
        """Ask for the trunk's optimizer step, without waiting for it."""
        frame = pb.Apply(step=step, **vars(counters))
        frame.gradients.extend(encode_named(gradients or {}))
        self._send(_Request(client_frame(apply=frame), "applied", step))

    def applied(self) -> StepResult:
        """Wait for the result of the last `apply`."""
        reply = self._answer()
        self.trunk_seconds += reply.seconds
        state = decode_named(reply.state)
        return StepResult(step=reply.step, grad_norm=reply.grad_norm, lr=reply.lr, state=state)

    def close(self) -> None:
        """Say good-bye and end the stream; nothing is left to do after an error or a good-bye."""
        if self._over:
            return
        try:
            self._send(_Request(client_frame(close=pb.Close()), "closed"))
            self._answer()
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

    def _ask(self, request: _Request) -> Any:
        self._send(request)
        reply = self._answer()
        self.trunk_seconds += reply.seconds
        return reply

    def _send(self, request: _Request) -> None:
        if self._over:
            raise TrunkError("this link has ended", kind="closed")
        if len(request.raw) > self._limit:
            raise TrunkError(
                f"a frame of {len(request.raw) / 2**20:.3g} MiB exceeds link.max_frame_mb="
                f"{self._config.max_frame_mb:g}; raise it, or lower train.batch_size or "
                "data.context",
                kind="too-large",
            )
        self._outstanding = request
        self._put(request)

    def _put(self, request: _Request) -> None:
        self.bytes_up += len(request.raw)
        self._connection.send(request.raw)

    def _answer(self) -> Any:
        """Wait for the answer to the outstanding request, whatever it takes within the deadline."""
        request, self._outstanding = self._outstanding, None
        if request is None:
            raise RuntimeError("nothing was asked")
        timeout, breaks = self._config.timeout, 0
        deadline = time.monotonic() + timeout
        with self._ending_in_words():
            while (left := deadline - time.monotonic()) > 0:
                try:
                    frame = self._receive(min(left, repeat(timeout)))
                except TrunkError as error:
                    if error.kind == BROKEN:
                        breaks += 1
                        self._connection.reopen(error, breaks)
                        deadline = time.monotonic() + timeout
                    elif error.kind != "damaged":
                        raise
                    frame = None
                if frame is None:
                    self._repeat(request)
                elif frame.WhichOneof("body") == "failure":
                    self._take_failure(frame.failure, request)
                elif request.fits(frame):
                    return getattr(frame, request.answer)
                # Else an answer that came twice, because its question did.
            raise TrunkError(
                f"the trunk at {self._address} did not answer within {timeout:g} s; raise "
                "link.timeout if it is only busy",
                kind="timeout",
            )

    def _repeat(self, request: _Request) -> None:
        if request.answer == "gradients":
            self._put(self._question(request.step, request.micro))
        else:
            self._put(request)

    def _question(self, step: int, micro: int) -> _Request:
        frame = pb.GetGradients(step=step, micro=micro)
        return _Request(client_frame(get_gradients=frame), "gradients", step, micro)

    def _take_failure(self, failure: pb.Failure, request: _Request) -> None:
        """Send again what did not arrive; `TrunkError` if the trunk refuses it."""
        error = TrunkError(failure.message, kind=failure.kind)
        if not error.passes:
            raise error
        if error.kind == "damaged":
            self._repeat(request)
        elif error.kind == "missing" and request.answer == "gradients":
            if (failure.step, failure.micro) != (request.step, request.micro):
                return
            if request == self._question(request.step, request.micro):
                raise error  # the caller asked for what never was
            self._put(request)

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

    def _expect(self, message: pb.Tensor, what: str, like: Tensor) -> Tensor:
        """Decode a reply that must have the shape of what was sent, in its dtype."""
        if (shape := shape_of(message, what)) != tuple(like.shape):
            raise TrunkError(
                f"{what} came back with shape {shape}, sent was {tuple(like.shape)}", kind="shape"
            )
        return decode(message, what, self._dtype).to(like.device, like.dtype)
