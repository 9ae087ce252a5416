"""What the trunk answers to the frames of one session, however they travel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from strategies.engine.session import Session
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.registry import crossings
from strategies.transport.codec.tensors import (
    decode,
    decode_named,
    encode_named,
    shape_of,
)
from strategies.transport.frames import failure_of, read_client_frame, server_frame
from strategies.transport.kept import KeptReplies

PATIENCE = 0.2
"""Seconds between two looks whether a frame that waits is still wanted."""

MAX_REPEATS = 64
"""Frames in a row that may move nothing; a client repeats a question 8 times before it gives up."""

MAX_DAMAGED = 16
"""Damaged frames in a row after which a session is given up."""


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
    codec : str
        Of activations and gradients, as `link.dtype` names it.
    on_step : callable
        Called with a `StepReport` after each step.
    limit : int
        Largest frame, bytes.

    Notes
    -----
    A frame that comes again is answered with the same bytes and done once, so that a client may
    repeat whatever was not answered. One thread at a time is served: a stream that broke may still
    be at work when the next one begins.
    """

    def __init__(
        self,
        key: str,
        session: Session,
        codec: str,
        on_step: Callable[[StepReport], None],
        limit: int,
    ) -> None:
        self.key, self.session = key, session
        self._codecs, self._on_step, self._limit = crossings(codec, key), on_step, limit
        self._serving = threading.Lock()
        self._kept = KeptReplies(session)
        self._damaged = self._repeats = 0
        # What has moved, and the trunk's own time, since the last step.
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
            self.session.meter.received(len(raw))
            started, before = time.perf_counter(), self.session.moves
            reply = self._reply_or_failure(raw, started)
            self._seconds += time.perf_counter() - started
            self._check_progress(before)
            self._bytes_down += len(reply)
            self.session.meter.sent(len(reply))
            return reply
        finally:
            self._serving.release()

    def _check_progress(self, before: int) -> None:
        """A client that only repeats itself must not hold a turn, or others up, for ever."""
        moved = self.session.moves != before or not self.session.round.training
        self._repeats = 0 if moved else self._repeats + 1
        if self._repeats > MAX_REPEATS:
            raise TrunkError(f"{MAX_REPEATS} frames in a row moved nothing", kind="order")

    def _reply_or_failure(self, raw: bytes, started: float) -> bytes:
        if len(raw) > self._limit:
            raise TrunkError(
                f"a frame of {len(raw)} bytes came, at most {self._limit} are accepted; raise "
                "link.max_frame_mb, or lower train.batch_size or data.context",
                kind="too-large",
            )
        frame = pb.ClientFrame()
        try:
            frame = read_client_frame(raw)
            self._damaged = 0
            reply = self._kept.again(frame, raw)
            if reply is None:
                reply = server_frame(**self._reply(frame, started))
                self._kept.keep(frame, raw, reply)
            return reply
        except TrunkError as error:
            self.session.meter.failed(error.kind)
            if not error.passes:
                raise
            self._damaged += error.kind == "damaged"
            if self._damaged > MAX_DAMAGED:
                raise TrunkError(f"{MAX_DAMAGED} frames in a row: {error}", kind="order") from error
            asked = frame.get_gradients
            return server_frame(failure=failure_of(error, asked.step, asked.micro))

    def frame(self, **body: object) -> bytes:
        """A frame to the client, counted."""
        raw = server_frame(**body)
        self._bytes_down += len(raw)
        self.session.meter.sent(len(raw))
        return raw

    def _reply(self, frame: pb.ClientFrame, started: float) -> dict[str, Any]:
        body = frame.WhichOneof("body")
        with self.session.meter.frame(body or ""):
            return self._serve(body, frame, started)

    def _serve(self, body: str | None, frame: pb.ClientFrame, started: float) -> dict[str, Any]:
        if body == "compute":
            return {"activations": self._compute(frame.compute, started)}
        if body == "backward":
            return {"gradients": self._backward(frame.backward, started)}
        if body == "apply":
            return {"applied": self._apply(frame.apply)}
        self.closed, self.left = not frame.close.early, frame.close.early
        self.session.close()
        return {"closed": pb.Closed(steps=self.session.applied, tokens=self.session.tokens)}

    def _compute(self, frame: pb.Compute, started: float) -> pb.Activations:
        masked = frame.HasField("mask")
        # Before memory is taken: a mask unpacks to 64 times its bytes, attention grows with T * T.
        self.session.check_shapes(
            shape_of(frame.activations, "activations"),
            shape_of(frame.mask, "mask") if masked else None,
        )
        self.session.check_fresh(frame.step, frame.micro)
        h_BTD = self._codecs.h1.decode(frame.activations, "activations")
        mask_BT = decode(frame.mask, "mask") if masked else None
        if mask_BT is not None and mask_BT.dtype != torch.bool:
            raise TrunkError(f"the mask must be BOOL, got {mask_BT.dtype}", kind="codec")
        mask_BT = None if mask_BT is None else mask_BT.long()
        h_BTD = self.session.compute(frame.step, frame.micro, h_BTD, mask_BT)
        return pb.Activations(
            step=frame.step,
            micro=frame.micro,
            activations=self._codecs.h2.encode(h_BTD, frame.step, frame.micro),
            seconds=time.perf_counter() - started,
        )

    def _backward(self, frame: pb.Backward, started: float) -> pb.Gradients:
        self.session.check_shapes(shape_of(frame.gradient, "gradient"), None)
        self.session.check_fresh(frame.step, frame.micro, back=True)
        grad_BTD, square = self.session.backward(
            frame.step,
            frame.micro,
            self._codecs.grad_h2.decode(frame.gradient, "gradient"),
            last=frame.last,
            tokens=frame.tokens,
        )
        return pb.Gradients(
            step=frame.step,
            micro=frame.micro,
            gradient=self._codecs.grad_h1.encode(grad_BTD, frame.step, frame.micro),
            square_norm=square,
            seconds=time.perf_counter() - started,
        )

    def _apply(self, frame: pb.Apply) -> pb.Applied:
        shapes = {each.name: shape_of(each.tensor, f"'{each.name}'") for each in frame.gradients}
        if len(shapes) != len(frame.gradients):
            # One that hides behind another of its name would be read unchecked.
            raise TrunkError("a name comes twice among the ends' gradients", kind="shape")
        self.session.check_ends(shapes)
        started = time.perf_counter()
        result = self.session.apply(
            frame.step,
            client_square_norm=frame.client_square_norm,
            tokens=frame.tokens,
            gradients=decode_named(frame.gradients),
        )
        seconds = time.perf_counter() - started
        if frame.tokens:  # else the step had no example of this client
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
