"""What the trunk answers to the frames of one session, however they travel."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from google.protobuf.message import DecodeError

from strategies.errors import TrunkError
from strategies.session import Session
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec import (
    WIRE_VERSION,
    decode,
    decode_named,
    encode,
    encode_named,
    shape_of,
)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One applied step as seen from the trunk, for the run's metrics."""

    key: str
    client: str
    step: int
    steps: int
    loss: float
    tokens: int
    grad_norm: float
    lr: float
    bytes_up: int
    bytes_down: int
    seconds: dict[str, float]


class Conversation:
    """Frames of one session in, frames out.

    Parameters
    ----------
    key : str
        The session's name on the server.
    session : Session
        What the frames drive.
    dtype : torch.dtype
        Of activations and gradients on the wire.
    on_step : callable
        Called with a `StepReport` after each step.
    """

    def __init__(
        self,
        key: str,
        session: Session,
        dtype: torch.dtype,
        on_step: Callable[[StepReport], None],
    ) -> None:
        self.key, self.session = key, session
        self._dtype, self._on_step = dtype, on_step
        # What has moved, and the trunk's own time, since the last step.
        self._bytes_up = self._bytes_down = 0
        self._seconds = 0.0
        self.closed = False

    def answer(self, raw: bytes) -> bytes:
        """Answer one frame; `TrunkError` in words if it cannot be served."""
        self._bytes_up += len(raw)
        started = time.perf_counter()
        reply = self._reply(parse(raw), started)
        self._seconds += time.perf_counter() - started
        return self.frame(**reply)

    def frame(self, **body: object) -> bytes:
        """A frame to the client, counted."""
        raw = server_frame(**body)
        self._bytes_down += len(raw)
        return raw

    def _reply(self, frame: pb.ClientFrame, started: float) -> dict[str, Any]:
        body = frame.WhichOneof("body")
        if body == "compute":
            return {"activations": self._compute(frame.compute, started)}
        if body == "backward":
            return {"gradients": self._backward(frame.backward, started)}
        if body == "get_gradients":
            return {"gradients": self._again(frame.get_gradients, started)}
        if body == "apply":
            return {"applied": self._apply(frame.apply)}
        self.closed = True
        return {"closed": pb.Closed(steps=self.session.applied, tokens=self.session.tokens)}

    def _compute(self, frame: pb.Compute, started: float) -> pb.Activations:
        masked = frame.HasField("mask")
        # Before memory is taken: a mask unpacks to 64 times its bytes, attention grows with T * T.
        self.session.check_shapes(
            shape_of(frame.activations, "activations"),
            shape_of(frame.mask, "mask") if masked else None,
        )
        h_BTD = decode(frame.activations, "activations")
        mask_BT = decode(frame.mask, "mask") if masked else None
        if mask_BT is not None and mask_BT.dtype != torch.bool:
            raise TrunkError(f"the mask must be BOOL, got {mask_BT.dtype}", kind="codec")
        mask_BT = None if mask_BT is None else mask_BT.long()
        h_BTD = self.session.compute(frame.step, frame.micro, h_BTD, mask_BT)
        return pb.Activations(
            step=frame.step,
            micro=frame.micro,
            activations=encode(h_BTD, self._dtype),
            seconds=time.perf_counter() - started,
        )

    def _backward(self, frame: pb.Backward, started: float) -> pb.Gradients:
        grad_BTD, square = self.session.backward(
            frame.step,
            frame.micro,
            decode(frame.gradient, "gradient"),
            last=frame.last,
            tokens=frame.tokens,
        )
        return self._gradients(frame, grad_BTD, square, started)

    def _again(self, frame: pb.GetGradients, started: float) -> pb.Gradients:
        grad_BTD, square = self.session.get_gradients(frame.step, frame.micro)
        return self._gradients(frame, grad_BTD, square, started)

    def _gradients(
        self, frame: pb.Backward | pb.GetGradients, grad: torch.Tensor, square: float, start: float
    ) -> pb.Gradients:
        return pb.Gradients(
            step=frame.step,
            micro=frame.micro,
            gradient=encode(grad, self._dtype),
            square_norm=square,
            seconds=time.perf_counter() - start,
        )

    def _apply(self, frame: pb.Apply) -> pb.Applied:
        before = self.session.applied
        started = time.perf_counter()
        result = self.session.apply(
            frame.step,
            client_square_norm=frame.client_square_norm,
            tokens=frame.tokens,
            gradients=decode_named(frame.gradients),
        )
        seconds = time.perf_counter() - started
        # A step that came twice is reported once, one without an example of this client not at all.
        if self.session.applied > before and frame.tokens:
            self._on_step(
                StepReport(
                    key=self.key,
                    client=self.session.client,
                    step=frame.step,
                    steps=self.session.steps,
                    loss=frame.loss,
                    tokens=frame.tokens,
                    grad_norm=result.grad_norm,
                    lr=result.lr,
                    bytes_up=self._bytes_up,
                    bytes_down=self._bytes_down,
                    seconds={
                        "bottom": frame.seconds_bottom,
                        "network": frame.seconds_network,
                        "trunk": self._seconds + seconds,
                        "top": frame.seconds_top,
                    },
                )
            )
            # What this frame and its reply weigh belongs to the next step.
            self._bytes_up = self._bytes_down = 0
            self._seconds = -seconds
        return pb.Applied(
            step=frame.step,
            grad_norm=result.grad_norm,
            lr=result.lr,
            seconds=seconds,
            state=encode_named(result.state),
        )


def parse(raw: bytes) -> pb.ClientFrame:
    """Read a client's frame; `TrunkError` if it is none of this version."""
    try:
        frame = pb.ClientFrame.FromString(raw)
    except DecodeError as error:
        raise TrunkError(f"a frame of {len(raw)} bytes is not a Graft frame: {error}") from error
    if frame.version != WIRE_VERSION:
        raise TrunkError(
            f"wire version {frame.version} came, version {WIRE_VERSION} is spoken here; run the "
            "same release of Graft on both sides",
            kind="version",
        )
    if frame.WhichOneof("body") is None:
        raise TrunkError("a frame without a body came")
    return frame


def read_server_frame(raw: bytes) -> pb.ServerFrame:
    """Read the trunk's frame; `TrunkError` if it is none of this version, or says what failed."""
    try:
        frame = pb.ServerFrame.FromString(raw)
    except DecodeError as error:
        raise TrunkError(f"a frame of {len(raw)} bytes is not a Graft frame: {error}") from error
    if frame.WhichOneof("body") == "failure":
        raise TrunkError(frame.failure.message, kind=frame.failure.kind)
    if frame.version != WIRE_VERSION:
        raise TrunkError(
            f"wire version {frame.version} came from the trunk, version {WIRE_VERSION} is spoken "
            "here; run the same release of Graft on both sides",
            kind="version",
        )
    return frame


def server_frame(**body: object) -> bytes:
    """A frame to a client."""
    raw: bytes = pb.ServerFrame(version=WIRE_VERSION, **body).SerializeToString()  # type: ignore[arg-type]
    return raw


def client_frame(**body: object) -> bytes:
    """A frame to the trunk."""
    raw: bytes = pb.ClientFrame(version=WIRE_VERSION, **body).SerializeToString()  # type: ignore[arg-type]
    return raw
