"""A client's end of the data plane: what it asks the trunk for, and how an answer is read.

What goes between (a stream, Flower's messages, nothing at all) is a `Link`'s own matter.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from conf.schema import LinkConfig
from strategies.engine.checks import check_finite, norm_error
from strategies.engine.lane import StepResult
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.cache import Cache, ClientCache
from strategies.transport.codec.codec import Codec
from strategies.transport.codec.registry import crossings
from strategies.transport.codec.tensors import (
    decode_named,
    encode_mask,
    encode_named,
    shape_of,
)
from strategies.transport.frames import Frame, client_frame
from strategies.transport.payload import Parcel, Payload


@dataclass(frozen=True, kw_only=True)
class StepCounters:
    """What a client tells of a step besides gradients: scalars only."""

    client_square_norm: float
    tokens: int
    loss: float = 0.0
    seconds_bottom: float = 0.0
    seconds_network: float = 0.0
    seconds_top: float = 0.0


class OfCompute(TypedDict, total=False):
    """What else goes with a `compute`."""

    frozen: bool
    """The bottom learns nothing: no dL/dh1 comes back."""
    names: Sequence[bytes]
    """Stand for the rows' examples: what both sides have kept of those stays away."""


class OfBack(TypedDict):
    """What else goes with a `backward`."""

    last: bool
    """The last micro-batch of its step."""
    tokens: NotRequired[int]


class Sender(Protocol):
    """The halves of each verb that only send; see `Framed`."""

    def compute(
        self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfCompute]
    ) -> None: ...

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfBack]
    ) -> None: ...

    def apply(
        self, step: int, counters: StepCounters, gradients: Mapping[str, Tensor] | None = None
    ) -> None: ...


class Link(Sender, Protocol):
    """The trunk as a client sees it.

    `computed`, `gradients` and `applied` wait for the answer to the first `compute`, `backward` or
    `apply` whose answer has not been taken; answers are taken in the order of the questions. So
    several micro-batches can be under way, and both sides take their optimizer steps at the same
    time.
    """

    bytes_up: int
    bytes_down: int
    trunk_seconds: float

    def computed(self) -> Tensor: ...

    def gradients(self) -> tuple[Tensor | None, float]: ...

    def applied(self) -> StepResult: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class Request:
    """A frame that waits for its answer.

    It is encoded once: whoever sends it again sends the same bytes, whatever the codec.
    """

    raw: bytes = field(repr=False)
    answer: str
    step: int = 0
    micro: int = 0
    number: int = 0
    """In its session, from 1; 0 of what may come at any time."""
    shape: tuple[int, ...] = ()
    """Of the tensor that was sent, which the answer's must have."""
    names: Sequence[bytes] = ()
    """Of its rows' examples, with a cache."""
    tags: Sequence[int] = ()
    """Of what the client had kept of their h2."""
    mask_BT: Tensor | None = None
    """Its positions that are no padding; the answer has the same."""
    reply: Any = None
    """The answer's body, once it has come."""
    payload: Payload = field(default_factory=Payload)
    """With it."""

    def fits(self, frame: Frame[pb.ServerFrame]) -> bool:
        """Whether a frame is the answer."""
        if frame.kind != self.answer:
            return False
        body = getattr(frame.head, frame.kind)
        if frame.kind in ("opened", "closed"):
            return True
        if frame.kind == "generated":
            return bool(body.number == self.number)
        place = body.step, getattr(body, "micro", 0)
        return bool(frame.head.number == self.number) and place == (self.step, self.micro)

    def take(self, frame: Frame[pb.ServerFrame]) -> None:
        """Keep the answer."""
        self.reply, self.payload = getattr(frame.head, frame.kind), frame.payload


class Framed:
    """Puts a client's tensors into frames, and checks what the trunk's frames hold.

    Parameters
    ----------
    config : LinkConfig
        Names the codecs of activations and gradients.
    seed : int
        Of the session's codecs.
    cache : Cache, optional
        Of the activations of this client's examples.
    """

    def __init__(self, config: LinkConfig, seed: int, cache: Cache | None = None) -> None:
        self.codecs = crossings(config.codec, seed)
        self.cache = None
        if cache is not None:
            self.cache = ClientCache(cache, crossings(config.codec, seed))
        self._unwanted: set[tuple[int, int]] = set()
        """Micro-batches of which the trunk wants no dL/dh2."""
        self.number = self.taken = 0
        """Frames that were sent, and answers to them that were taken, which are in their order."""

    def send(self, request: Request) -> None:
        """Let a frame go."""
        raise NotImplementedError

    def _send(self, request: Request, parcel: Parcel, **body: object) -> None:
        """Give a frame its number, and let it go."""
        self.number += 1
        request.number = self.number
        request.raw = client_frame(parcel, number=self.number, seen=self.taken, **body)
        self.send(request)

    def compute(
        self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfCompute]
    ) -> None:
        """Send activations (B, T, D) through the trunk; see `Session.compute`."""
        parcel, shape = Parcel(), tuple(h_BTD.shape)
        names, frozen = how.get("names", ()), how.get("frozen", False)
        frame = pb.Compute(step=step, micro=micro, mask=encode_mask(mask_BT), frozen=frozen)
        tags: Sequence[int] = ()
        if self.cache and names:
            place = step, micro
            fields = self.cache.write_h1(h_BTD, mask_BT, names, self.codecs.h1, place, parcel)
            frame.MergeFrom(pb.Compute(**fields))
            tags = fields["tags"]
        else:
            frame.activations.CopyFrom(self.codecs.h1.encode(h_BTD, mask_BT, step, micro, parcel))
        request = Request(b"", "activations", step, micro, shape=shape, mask_BT=mask_BT)
        request.names, request.tags = names, tags
        self._send(request, parcel, compute=frame)

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfBack]
    ) -> None:
        """Send dL/dh2 back through the trunk; see `Session.backward`."""
        parcel, shape = Parcel(), tuple(grad_BTD.shape)
        frame = pb.Backward(step=step, micro=micro, **how)
        if (step, micro) not in self._unwanted:
            gradient = self.codecs.grad_h2.encode(grad_BTD, mask_BT, step, micro, parcel)
            frame.gradient.CopyFrom(gradient)
        self._unwanted.discard((step, micro))
        request = Request(b"", "gradients", step, micro, shape=shape, mask_BT=mask_BT)
        self._send(request, parcel, backward=frame)

    def apply(
        self, step: int, counters: StepCounters, gradients: Mapping[str, Tensor] | None = None
    ) -> None:
        """Ask for the optimizer step; see `Session.apply`."""
        parcel, frame = Parcel(), pb.Apply(step=step, **vars(counters))
        gradients = gradients or {}
        zero = {name: torch.zeros((), device=each.device) for name, each in gradients.items()}
        frame.gradients.extend(encode_named(gradients, parcel, zero))
        self._send(Request(b"", "applied", step), parcel, apply=frame)

    def read_activations(self, answered: Request) -> Tensor:
        """h2 (B, T, D), of the wire's dtype; `TrunkError` for another shape, or if not finite."""
        reply = answered.reply
        what = f"the trunk's output of step {reply.step}"
        if reply.frozen:
            self._unwanted.add((reply.step, reply.micro))
        if not (self.cache and answered.names):
            return _read(self.codecs.h2, reply.activations, what, answered)
        _check_shape(reply.activations, what, answered)
        h2_BTD = self.cache.read_h2(
            reply, answered.names, answered.tags, answered.mask_BT, answered.payload
        )
        check_finite(h2_BTD, what)
        return h2_BTD

    def read_gradients(self, answered: Request) -> tuple[Tensor | None, float]:
        """dL/dh1, checked like h2, and the squared norm of the trunk's gradient; None if the trunk
        sends no dL/dh1."""
        reply = answered.reply
        what = f"the trunk's gradient of step {reply.step}"
        if reply.square_norm < 0:
            raise TrunkError(f"{what} came with a square norm of {reply.square_norm:g}")
        if not reply.HasField("gradient"):
            return None, reply.square_norm
        return _read(self.codecs.grad_h1, reply.gradient, what, answered), reply.square_norm

    def read_applied(self, answered: Request) -> StepResult:
        """The trunk's step, with what it changed of the ends under `train.sync=step`."""
        reply = answered.reply
        state = decode_named(reply.state, answered.payload)
        for name, tensor in state.items():
            check_finite(tensor, f"'{name}' after step {reply.step}")
        if not math.isfinite(reply.grad_norm):
            raise norm_error(reply.step, reply.grad_norm)
        rows = {each.name: torch.tensor(each.rows[:]) for each in reply.state if each.rows}
        return StepResult(
            step=reply.step, grad_norm=reply.grad_norm, lr=reply.lr, state=state, rows=rows
        )


def _read(codec: Codec, message: pb.Tensor, what: str, answered: Request) -> Tensor:
    _check_shape(message, what, answered)
    tensor = codec.decode(message, answered.mask_BT, answered.payload, what)
    check_finite(tensor, what)
    return tensor


def _check_shape(message: pb.Tensor, what: str, answered: Request) -> None:
    if (came := shape_of(message, what)) != answered.shape:
        raise TrunkError(f"{what} came with shape {came}, sent was {answered.shape}", kind="shape")
