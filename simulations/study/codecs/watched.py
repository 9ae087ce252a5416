"""A session's codecs, watched: what each crossing weighs, loses and takes.

Shapes: B sequences, T tokens, D hidden size, N tokens that are not padding.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from conf.schema import LinkConfig
from conf.sections.link import CROSSINGS
from simulations.plan.frames import FramedLink
from strategies.engine.session import Session
from strategies.transport import trunk_pb2 as pb
from strategies.transport.cache import Cache
from strategies.transport.codec.codec import Codec
from strategies.transport.codec.registry import Crossings
from strategies.transport.conversation import Conversation
from strategies.transport.frames import read_client_frame
from strategies.transport.link import Request
from strategies.transport.payload import Parcel, Payload


@dataclass
class Crossing:
    """What crossed a cut one way, over all tensors; padding does not count as elements."""

    elements: int = 0
    payload: int = 0
    """Bytes of the tensors in the frames, with whatever a codec adds to decode them."""
    energy: float = 0.0
    """Sum of squares before; of what is kept and named later (link.cache_mb) it is not known."""
    error: float = 0.0
    """Sum of squares of what was lost."""
    encoding: list[float] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)
    """Seconds for a byte of fp32, of each tensor."""

    def summary(self) -> dict[str, float | int]:
        """Bits of an element, relative error, and milliseconds for a million bytes of fp32."""
        return {
            "elements": self.elements,
            "payload": self.payload,
            "bits": 8 * self.payload / self.elements if self.elements else 0.0,
            "error": (self.error / self.energy) ** 0.5 if self.energy else 0.0,
            "encode_ms_per_mb": 1e9 * statistics.median(self.encoding or [0.0]),
            "decode_ms_per_mb": 1e9 * statistics.median(self.decoding or [0.0]),
        }


class Watch:
    """Watches the codecs of both sides of a session in this process."""

    def __init__(self) -> None:
        self.crossings = {name: Crossing() for name in CROSSINGS}
        self.sent: dict[str, deque[Tensor]] = {name: deque() for name in CROSSINGS}

    def over(self, codecs: Crossings) -> Crossings:
        """The codecs of one side of a session, watched."""
        return Crossings(**{name: Watched(self, name, each) for name, each in vars(codecs).items()})


class Watched(Codec):
    """A codec that tells what it did.

    Parameters
    ----------
    watch : Watch
        Is told.
    crossing : str
        Which way.
    codec : Codec
        Does the work.
    """

    def __init__(self, watch: Watch, crossing: str, codec: Codec) -> None:
        super().__init__(codec.seed)
        self._watch, self._codec = watch, codec
        self._crossing, self._sent = watch.crossings[crossing], watch.sent[crossing]

    def encode(
        self, tensor_BTD: Tensor, mask_BT: Tensor | None, step: int, micro: int, parcel: Parcel
    ) -> pb.Tensor:
        """See `Codec.encode`."""
        started = time.perf_counter()
        message = self._codec.encode(tensor_BTD, mask_BT, step, micro, parcel)
        seconds = time.perf_counter() - started
        own, sent = self._crossing, tokens_of(tensor_BTD.detach(), mask_BT).to("cpu", copy=True)
        own.encoding.append(seconds / (4 * sent.numel()))
        self._sent.append(sent)
        return message

    def decode(
        self, message: pb.Tensor, mask_BT: Tensor | None, payload: Payload, what: str
    ) -> Tensor:
        """See `Codec.decode`."""
        started = time.perf_counter()
        tensor_BTD = self._codec.decode(message, mask_BT, payload, what)
        seconds = time.perf_counter() - started
        own, before = self._crossing, self._sent.popleft().double()
        after = tokens_of(tensor_BTD, mask_BT).double()
        own.energy += float(before.square().sum())
        own.error += float((after - before).square().sum())
        own.decoding.append(seconds / (4 * before.numel()))
        return tensor_BTD


class WatchedLink(FramedLink):
    """A link to a session in this process, over frames, whose codecs are watched.

    Parameters
    ----------
    config : LinkConfig
        Names the codecs.
    session : Session
        Answers.
    """

    def __init__(self, config: LinkConfig, session: Session) -> None:
        self.watch, size = Watch(), int(config.cache_mb * 2**20)
        caches = [Cache(size) if size else None for _ in range(2)]
        super().__init__(config, WatchedTalk(config, session, self.watch, caches[0]), caches[1])
        self.codecs = self.watch.over(self.codecs)

    def send(self, request: Request) -> None:
        """See `FramedLink`; weighs what crosses."""
        super().send(request)
        head, reply, found = (
            read_client_frame(request.raw).head,
            request.reply,
            self.watch.crossings,
        )
        up = {"h1": head.compute.activations, "grad_h2": head.backward.gradient}
        down: dict[str, list[pb.Tensor]] = {}
        if request.answer == "activations":
            down["h2"] = [reply.activations, reply.changes]
        elif request.answer == "gradients":
            down["grad_h1"] = [reply.gradient]
        for name, messages in {**{n: [m] for n, m in up.items()}, **down}.items():
            if messages[0].shape:
                B, T, D = messages[0].shape
                mask_BT = request.mask_BT
                positions = B * T if mask_BT is None else int(mask_BT.bool().sum())
                found[name].elements += positions * D
                found[name].payload += sum(each.size for each in messages)

    def summary(self) -> Mapping[str, dict[str, float | int]]:
        """What each crossing came to."""
        return {name: each.summary() for name, each in self.watch.crossings.items()}


class WatchedTalk(Conversation):
    """The trunk's side of a `WatchedLink`."""

    def __init__(
        self, config: LinkConfig, session: Session, watch: Watch, cache: Cache | None
    ) -> None:
        super().__init__("study", session, config.codec, lambda report: None, 2**62, cache)
        self._codecs = watch.over(self._codecs)


def tokens_of(tensor_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The rows (N, D) that are not padding."""
    if mask_BT is None:
        return tensor_BTD.reshape(-1, tensor_BTD.shape[-1])
    return tensor_BTD[mask_BT.bool().to(tensor_BTD.device)]
