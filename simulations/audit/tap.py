"""A session's link and talk over real frames, tapped: what each side decodes is kept.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Unpack

import torch
from torch import Tensor

from conf.schema import LinkConfig
from simulations.audit.observation import Crossed
from simulations.plan.frames import FramedLink
from strategies.engine.session import Session
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.codec import Codec
from strategies.transport.codec.registry import Crossings
from strategies.transport.conversation import Conversation
from strategies.transport.link import OfBack, OfCompute, StepCounters
from strategies.transport.payload import Parcel, Payload

Heard = Callable[[str, Tensor], None]
"""Told of each tensor that was decoded, by crossing."""


class TappedCodec(Codec):
    """A codec that tells what it decodes."""

    def __init__(self, codec: Codec, crossing: str, heard: Heard) -> None:
        super().__init__(codec.seed, gradient=codec.gradient)
        self._codec, self._crossing, self._heard = codec, crossing, heard

    def encode(
        self, tensor_BTD: Tensor, mask_BT: Tensor | None, step: int, micro: int, parcel: Parcel
    ) -> pb.Tensor:
        """See `Codec.encode`."""
        return self._codec.encode(tensor_BTD, mask_BT, step, micro, parcel)

    def decode(
        self, message: pb.Tensor, mask_BT: Tensor | None, payload: Payload, what: str
    ) -> Tensor:
        """See `Codec.decode`."""
        tensor_BTD = self._codec.decode(message, mask_BT, payload, what)
        self._heard(self._crossing, tensor_BTD.detach().to("cpu", torch.float32, copy=True))
        return tensor_BTD


def _tapped(codecs: Crossings, heard: Heard) -> Crossings:
    return Crossings(**{way: TappedCodec(each, way, heard) for way, each in vars(codecs).items()})


class TappedLink(FramedLink):
    """A link to a session in this process, over frames, that keeps what crosses.

    Parameters
    ----------
    config : LinkConfig
        Names the codecs.
    session : Session
        Answers.
    before : callable
        Told of each step and micro-batch when its h1 is sent: ends are then as h1 was made.
    after : callable
        Told of each step when it is applied: ends have its gradients then.
    """

    def __init__(
        self,
        config: LinkConfig,
        session: Session,
        before: Callable[[int, int], None] = lambda step, micro: None,
        after: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._before, self._after, self._place = before, after, (0, 0)
        self.crossed: dict[tuple[int, int], Crossed] = {}
        super().__init__(config, _TappedTalk(config, session, self._hear))
        self.codecs = _tapped(self.codecs, self._hear)

    def _hear(self, crossing: str, tensor_BTD: Tensor) -> None:
        setattr(self.crossed[self._place], f"{crossing}_BTD", tensor_BTD)

    def compute(
        self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfCompute]
    ) -> None:
        """See `Framed.compute`."""
        self._place = step, micro
        self.crossed[self._place] = Crossed(
            step=step, micro=micro, mask_BT=None if mask_BT is None else mask_BT.cpu()
        )
        self._before(step, micro)
        super().compute(step, micro, h_BTD, mask_BT, **how)

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfBack]
    ) -> None:
        """See `Framed.backward`."""
        self._place = step, micro
        self.crossed[self._place].tokens = how.get("tokens", 0)
        super().backward(step, micro, grad_BTD, mask_BT, **how)

    def apply(
        self, step: int, counters: StepCounters, gradients: Mapping[str, Tensor] | None = None
    ) -> None:
        """See `Framed.apply`."""
        self._after(step)
        super().apply(step, counters, gradients)


class _TappedTalk(Conversation):
    """The trunk's side of a `TappedLink`."""

    def __init__(self, config: LinkConfig, session: Session, heard: Heard) -> None:
        super().__init__("audit", session, config.codec, lambda report: None, 2**62)
        self._codecs = _tapped(self._codecs, heard)
