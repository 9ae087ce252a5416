"""What the trunk answers to the frames of a session that trains, however they travel."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strategies.deadlines import REPEAT_SHARE
from strategies.engine.engine import MAX_GRAPHS
from strategies.engine.session import Session
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.cache import Cache, TrunkCache
from strategies.transport.codec.registry import crossings
from strategies.transport.codec.tensors import (
    check_named,
    decode_changed,
    decode_mask,
    encode_named,
    shape_of,
)
from strategies.transport.frames import Frame, failure_of
from strategies.transport.kept import UNSEEN, KeptReplies
from strategies.transport.payload import Parcel, Payload
from strategies.transport.talk import Talk

MAX_REPEATS = 2 * round(1 / REPEAT_SHARE) * (UNSEEN * MAX_GRAPHS + 2)
"""Frames in a row that may move nothing: twice what a client sends that repeats its question until
it gives up, and with it all that it has under way, two for each micro-batch and one for the step's
end."""

ADVICE = "raise link.max_frame_mb, or lower train.batch_size or data.context"
"""About a frame that is too large."""


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


class Conversation(Talk):
    """Frames of one session of training or evaluation in, frames out.

    Parameters
    ----------
    key : str
        The session's name on the server.
    session : Session
        What the frames drive.
    codec : mapping
        Names the codec of each crossing, as `link.codec` does.
    on_step : callable
        Called with a `StepReport` after each step.
    limit : int
        Largest frame, bytes.
    cache : Cache, optional
        Of the activations of this client's examples.
    """

    def __init__(
        self,
        key: str,
        session: Session,
        codec: Mapping[str, str],
        on_step: Callable[[StepReport], None],
        limit: int,
        cache: Cache | None = None,
    ) -> None:
        super().__init__(session.meter, limit, ADVICE)
        self.key, self.session = key, session
        self._codecs, self._on_step = crossings(codec, session.codec_seed), on_step
        self._codec = codec
        self._cache = None
        if cache is not None:
            self._cache = TrunkCache(cache, crossings(codec, session.codec_seed))
        # Of the micro-batches whose backward is to come: which positions travel.
        self._masks: dict[int, Tensor | None] = {}
        self._kept = KeptReplies(session)
        self._repeats, self._moves = 0, session.moves

    def opened(self) -> pb.Opened:
        """The hidden size, the steps that the session was opened for, and the codecs."""
        session = self.session
        return pb.Opened(
            hidden_size=session.hidden_size,
            steps=session.steps,
            codecs=self._codec,
            names=self._cache.names() if self._cache else b"",
        )

    def end(self) -> None:
        """Drop what is under way."""
        self.session.close()

    def _check_progress(self) -> None:
        """A client that only repeats itself must not hold a turn, or others up, for ever."""
        before, self._moves = self._moves, self.session.moves
        moved = self._moves != before or not self.session.round.training
        self._repeats = 0 if moved else self._repeats + 1
        if self._repeats > MAX_REPEATS:
            raise TrunkError(f"{MAX_REPEATS} frames in a row moved nothing", kind="order")

    def _again(self, frame: pb.ClientFrame, raw: bytes) -> bytes | None:
        return self._kept.again(frame, raw)

    def _keep(self, frame: pb.ClientFrame, raw: bytes, reply: bytes) -> None:
        self._kept.keep(frame, raw, reply)

    def _failure(self, error: TrunkError, frame: pb.ClientFrame) -> pb.Failure:
        asked = frame.get_gradients
        return failure_of(error, asked.step, asked.micro)

    def _serve(
        self, frame: Frame[pb.ClientFrame], parcel: Parcel, started: float
    ) -> dict[str, Any]:
        head, payload = frame
        if frame.kind == "compute":
            return {"activations": self._compute(head.compute, payload, parcel, started)}
        if frame.kind == "backward":
            return {"gradients": self._backward(head.backward, payload, parcel, started)}
        if frame.kind == "apply":
            return {"applied": self._apply(head.apply, payload, parcel)}
        if frame.kind != "close":
            raise TrunkError(
                f"this trunk trains: '{frame.kind}' is none of its frames", kind="order"
            )
        self.closed, self.left = not head.close.early, head.close.early
        self.session.close()
        return {"closed": pb.Closed(steps=self.session.applied, tokens=self.session.tokens)}

    def _compute(
        self, frame: pb.Compute, payload: Payload, parcel: Parcel, started: float
    ) -> pb.Activations:
        session, step, micro = self.session, frame.step, frame.micro
        # Before memory is taken: attention grows with T * T.
        shape = shape_of(frame.activations, "activations")
        session.check_shapes(shape, None)
        session.check_fresh(step, micro)
        mask_BT = decode_mask(frame.mask, shape[:2])
        if frame.names and not self._cache:
            raise TrunkError(
                "names of examples came, and nothing is kept here (link.cache_mb=0); start both "
                "sides with the same link.cache_mb",
                kind="shape",
            )
        cache = self._cache if frame.names else None
        if cache:
            h_BTD = cache.read_h1(frame, mask_BT, payload)
        else:
            h_BTD = self._codecs.h1.decode(frame.activations, mask_BT, payload, "activations")
        mask = None if mask_BT is None else mask_BT.long()
        h_BTD = session.compute(step, micro, h_BTD, mask, wanted=not frame.frozen)
        frozen = False
        if session.round.training:
            self._masks[micro], frozen = mask_BT, not session.learns(micro)
        if cache:
            fields = cache.write_h2(frame, h_BTD, mask_BT, self._codecs.h2, parcel)
        else:
            h2 = self._codecs.h2.encode(h_BTD, mask_BT, step, micro, parcel)
            fields = {"activations": h2}
        return pb.Activations(
            step=step,
            micro=micro,
            seconds=time.perf_counter() - started,
            frozen=frozen,
            **fields,
        )

    def _backward(
        self, frame: pb.Backward, payload: Payload, parcel: Parcel, started: float
    ) -> pb.Gradients:
        step, micro = frame.step, frame.micro
        came = frame.HasField("gradient")
        shape = shape_of(frame.gradient, "gradient") if came else None
        self.session.check_due(step, micro, shape)
        mask_BT, grad_BTD = self._masks[micro], None
        if came:
            grad_BTD = self._codecs.grad_h2.decode(frame.gradient, mask_BT, payload, "gradient")
        grad_BTD, square = self.session.backward(
            step, micro, grad_BTD, last=frame.last, tokens=frame.tokens
        )
        del self._masks[micro]
        reply = pb.Gradients(step=step, micro=micro, square_norm=square)
        if grad_BTD is not None:
            gradient = self._codecs.grad_h1.encode(grad_BTD, mask_BT, step, micro, parcel)
            reply.gradient.CopyFrom(gradient)
        reply.seconds = time.perf_counter() - started
        return reply

    def _apply(self, frame: pb.Apply, payload: Payload, parcel: Parcel) -> pb.Applied:
        gradients = self._gradients_of_ends(frame, payload)
        started = time.perf_counter()
        result = self.session.apply(
            frame.step,
            client_square_norm=frame.client_square_norm,
            tokens=frame.tokens,
            gradients=gradients,
        )
        seconds = time.perf_counter() - started
        self._masks.clear()
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
            state=encode_named(result.state, parcel, result.since),
        )

    def _gradients_of_ends(self, frame: pb.Apply, payload: Payload) -> dict[str, Tensor]:
        """The gradients of the ends, of which those that are zero did not come."""
        ends = self.session.ends
        if frame.gradients and not ends:
            raise TrunkError(
                f"gradients of {len(frame.gradients)} of the ends' tensors came; without "
                "train.sync=step they stay with their client",
                kind="shape",
            )
        check_named(frame.gradients, {name: tensor.shape for name, tensor in ends.items()})
        if not frame.tokens:
            return {}
        zero = {name: torch.zeros(tensor.shape) for name, tensor in ends.items()}
        return zero | decode_changed(frame.gradients, payload, zero)
