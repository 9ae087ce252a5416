"""A client's end of the data plane."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError
from torch import Tensor

from conf.schema import LinkConfig
from strategies.errors import TrunkError
from strategies.session import Session, StepResult
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec import (
    WIRE_DTYPES,
    WIRE_VERSION,
    decode,
    decode_named,
    encode,
    encode_mask,
    encode_named,
)
from strategies.transport.service import CLIENT_KEY, METHOD, STEPS_KEY, TOKEN_KEY


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

    def get_gradients(self, step: int, micro: int) -> tuple[Tensor, float]: ...

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
        self.get_gradients = session.get_gradients

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


class GrpcLink:
    """One session over one stream.

    Parameters
    ----------
    address : str
        ``host:port`` of the trunk service.
    token : str
        From this client's ticket.
    client : str
        This client's stable name.
    steps : int
        Optimizer steps planned for this session; 0 to evaluate.
    config : LinkConfig
        Wire dtype, limits and deadlines.
    certificate : bytes
        PEM to trust; empty means plaintext (loopback).

    Raises
    ------
    TrunkError
        In words, when the trunk cannot be reached, refuses, or does not answer in time.
    """

    def __init__(
        self,
        address: str,
        token: str,
        *,
        client: str,
        steps: int,
        config: LinkConfig,
        certificate: bytes = b"",
    ) -> None:
        self._address, self._timeout = address, config.timeout
        self._dtype = WIRE_DTYPES[config.dtype]
        self._limit_mb, limit = config.max_frame_mb, int(config.max_frame_mb * 2**20)
        options = [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", -1),
            # A proxy from the environment would see activations that are meant for the trunk only.
            ("grpc.enable_http_proxy", 0),
        ]
        self._channel = (
            grpc.secure_channel(address, grpc.ssl_channel_credentials(certificate), options)
            if certificate
            else grpc.insecure_channel(address, options)
        )
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[bytes | TrunkError] = queue.SimpleQueue()
        self.bytes_up = self.bytes_down = 0
        self.trunk_seconds = 0.0
        try:
            grpc.channel_ready_future(self._channel).result(timeout=min(30.0, config.timeout))
        except grpc.FutureTimeoutError as error:
            self._channel.close()
            raise TrunkError(
                f"no trunk answers at {address}; check that link.advertise (or link.bind) is an "
                "address this client can reach, and that link.tls is the same on both sides",
                kind="unreachable",
            ) from error
        call = self._channel.stream_stream(METHOD)(
            iter(self._outbox.get, None),
            metadata=((TOKEN_KEY, token), (CLIENT_KEY, client), (STEPS_KEY, str(steps))),
        )
        threading.Thread(target=self._read, args=(call,), daemon=True, name="graft-link").start()
        self.hidden_size = self._receive("opened").hidden_size

    def compute(self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Send activations (B, T, D) through the trunk; see `Session.compute`."""
        frame = pb.Compute(step=step, micro=micro, activations=encode(h_BTD, self._dtype))
        if mask_BT is not None:
            frame.mask.CopyFrom(encode_mask(mask_BT))
        self._send(compute=frame)
        reply = self._receive("activations")
        self.trunk_seconds += reply.seconds
        return _expect(reply.activations, "activations", h_BTD)

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor, *, last: bool, tokens: int = 0
    ) -> tuple[Tensor, float]:
        """Send dL/dh2 back through the trunk, get dL/dh1; see `Session.backward`."""
        gradient = encode(grad_BTD, self._dtype)
        self._send(
            backward=pb.Backward(
                step=step, micro=micro, gradient=gradient, last=last, tokens=tokens
            )
        )
        reply = self._receive("gradients")
        self.trunk_seconds += reply.seconds
        return _expect(reply.gradient, "gradient", grad_BTD), reply.square_norm

    def get_gradients(self, step: int, micro: int) -> tuple[Tensor, float]:
        """Fetch the result of a `backward` again; see `Session.get_gradients`."""
        self._send(get_gradients=pb.GetGradients(step=step, micro=micro))
        reply = self._receive("gradients")
        return decode(reply.gradient, "gradient"), reply.square_norm

    def apply(
        self, step: int, counters: StepCounters, gradients: Mapping[str, Tensor] | None = None
    ) -> None:
        """Ask for the trunk's optimizer step, without waiting for it."""
        frame = pb.Apply(step=step, **vars(counters))
        frame.gradients.extend(encode_named(gradients or {}))
        self._send(apply=frame)

    def applied(self) -> StepResult:
        """Wait for the result of the last `apply`."""
        reply = self._receive("applied")
        self.trunk_seconds += reply.seconds
        state = decode_named(reply.state)
        return StepResult(step=reply.step, grad_norm=reply.grad_norm, lr=reply.lr, state=state)

    def close(self) -> None:
        """Say good-bye and end the stream. Called after an error, it only ends the stream."""
        try:
            self._send(close=pb.Close())
            self._receive("closed")
        finally:
            self.abort()

    def abort(self) -> None:
        """End the stream without a word."""
        self._outbox.put(None)
        self._channel.close()

    def _send(self, **body: object) -> None:
        raw: bytes = pb.ClientFrame(version=WIRE_VERSION, **body).SerializeToString()  # type: ignore[arg-type]
        if len(raw) > self._limit_mb * 2**20:
            raise TrunkError(
                f"a frame of {len(raw) / 2**20:.3g} MiB exceeds link.max_frame_mb="
                f"{self._limit_mb:g}; raise it, or lower train.batch_size or data.context",
                kind="too-large",
            )
        self.bytes_up += len(raw)
        self._outbox.put(raw)

    def _receive(self, kind: str) -> Any:
        try:
            raw = self._inbox.get(timeout=self._timeout)
        except queue.Empty:
            self.abort()
            raise TrunkError(
                f"the trunk at {self._address} did not answer within {self._timeout:g} s; raise "
                "link.timeout if it is only busy",
                kind="timeout",
            ) from None
        if isinstance(raw, TrunkError):
            self.abort()
            raise raw
        self.bytes_down += len(raw)
        try:
            frame = pb.ServerFrame.FromString(raw)
        except DecodeError as error:
            raise TrunkError(f"{self._address} does not speak Graft: {error}") from error
        body = frame.WhichOneof("body")
        if body == "failure":
            self.abort()
            raise TrunkError(frame.failure.message, kind=frame.failure.kind)
        if frame.version != WIRE_VERSION or body != kind:
            self.abort()
            raise TrunkError(
                f"expected '{kind}' of wire version {WIRE_VERSION} from the trunk, got '{body}' of "
                f"version {frame.version}",
                kind="version",
            )
        return getattr(frame, kind)

    def _read(self, call: Iterator[bytes]) -> None:
        """Move replies to the inbox, and say at its end why the stream ended."""
        try:
            for raw in call:
                self._inbox.put(raw)
            reason, kind = "it closed the stream", "closed"
        except grpc.RpcError as error:
            # The error of a stream is its call, which has both; other errors have neither.
            is_call = isinstance(error, grpc.Call)
            reason = (error.details() if is_call else "") or str(error)
            refused = is_call and error.code() == grpc.StatusCode.UNAUTHENTICATED
            kind = "refused" if refused else "closed"
        self._inbox.put(TrunkError(f"the trunk at {self._address}: {reason}", kind=kind))


def _expect(message: pb.Tensor, what: str, like: Tensor) -> Tensor:
    """Decode a reply that must have the shape of what was sent, in its dtype."""
    tensor = decode(message, what)
    if tensor.shape != like.shape:
        raise TrunkError(
            f"{what} came back with shape {tuple(tensor.shape)}, sent was {tuple(like.shape)}",
            kind="shape",
        )
    return tensor.to(like.device, like.dtype)
