"""What the trunk answers to the frames of a session that generates.

Legend: B rows, t new positions, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from strategies.engine.checks import check_finite
from strategies.engine.meter import Meter
from strategies.errors import TrunkError
from strategies.generation.memory import Limits
from strategies.generation.session import GONE, OVERFLOW
from strategies.optim import derive_seed
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.registry import crossings
from strategies.transport.codec.tensors import decode_mask, shape_of
from strategies.transport.frames import Frame, checksum_of
from strategies.transport.payload import Parcel, Payload
from strategies.transport.talk import Talk

ADVICE = "send fewer positions at once"


class Cached(Protocol):
    """A session of the engine's; see `GenerationSession`."""

    queued: float

    @property
    def bytes(self) -> int: ...

    def check_shape(self, shape: tuple[int, ...], rows: int, length: int) -> None: ...

    def forward(
        self,
        h_BTD: Tensor,
        *,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        rows: Sequence[int] = (),
        length: int = 0,
        keep: bool = True,
    ) -> Tensor: ...


class Engine(Protocol):
    """Holds a trunk and the caches of its sessions; see `GenerationEngine`."""

    hidden_size: int

    @property
    def limits(self) -> Limits: ...

    def open(self, name: str, *, fork: str = "") -> Cached: ...

    def close(self, name: str) -> None: ...


class Generating(Talk):
    """Frames of one session of generation in, frames out.

    Parameters
    ----------
    key : str
        The session's name on the server: its client's, a slash, and what it chose.
    engine : Engine
        What the frames drive.
    codec : mapping
        Names the codec of each crossing, as `link.codec` does.
    limit : int
        Largest frame, bytes.
    meter : Meter
        Told of the frames.
    """

    def __init__(
        self, key: str, engine: Engine, *, codec: Mapping[str, str], limit: int, meter: Meter
    ) -> None:
        super().__init__(meter, limit, ADVICE)
        self.key, self.engine, self._codec = key, engine, codec
        self._codecs = crossings(codec, seed_of(key))
        self._cache: Cached | None = None
        self._kept: tuple[bytes, bytes] = (b"", b"")
        self._number = 0
        self.ended = False
        self.tokens = 0

    def opened(self) -> pb.Opened:
        """What the trunk takes, and how."""
        return pb.Opened(
            hidden_size=self.engine.hidden_size,
            codecs=self._codec,
            limit=self._limit,
            chunk=self.engine.limits.tokens,
        )

    def end(self) -> None:
        """Forget what is cached."""
        self.ended, self._cache, self._kept = True, None, (b"", b"")
        self.engine.close(self.key)

    def retire(self) -> bool:
        """End a session that is not at work; whether it was not."""
        if not self._serving.acquire(blocking=False):
            return False
        try:
            self.end()
        finally:
            self._serving.release()
        return True

    def _again(self, frame: pb.ClientFrame, raw: bytes) -> bytes | None:
        if frame.WhichOneof("body") != "generate":
            return None
        number, (checksum, reply) = frame.generate.number, self._kept
        if self.ended:
            raise TrunkError("this session has ended", kind=GONE)
        if number == self._number and reply and checksum == checksum_of(raw):
            return reply
        if number > self._number + 1:
            raise TrunkError(
                f"frame {number} came, {self._number} were answered: the trunk has not the "
                "beginning of this text",
                kind=GONE,
            )
        if number <= self._number:
            kind = "stale" if number < self._number else "order"
            raise TrunkError(f"frame {number} came again, {self._number} is answered", kind=kind)
        return None

    def _keep(self, frame: pb.ClientFrame, raw: bytes, reply: bytes) -> None:
        if frame.WhichOneof("body") == "generate":
            self._number, self._kept = frame.generate.number, (checksum_of(raw), reply)

    def _serve(
        self, frame: Frame[pb.ClientFrame], parcel: Parcel, started: float
    ) -> dict[str, Any]:
        head, payload = frame
        if frame.kind == "generate":
            return {"generated": self._generate(head.generate, payload, parcel)}
        if frame.kind != "close":
            raise TrunkError(
                f"this trunk generates: '{frame.kind}' is none of its frames", kind="order"
            )
        self.closed, self.left = not head.close.early, head.close.early
        self.end()
        return {"closed": pb.Closed(tokens=self.tokens)}

    def _generate(self, frame: pb.Generate, payload: Payload, parcel: Parcel) -> pb.Generated:
        cache = self._begun(frame)
        B, T = _checked(frame, cache)
        mask_BT = decode_mask(frame.mask, (B, T))
        h_BTD = self._codecs.h1.decode(frame.activations, mask_BT, payload, "activations")
        started = time.perf_counter()
        output_BTD = cache.forward(
            h_BTD,
            mask_BT=mask_BT,
            positions_BT=torch.tensor(frame.positions[:]).view(B, T) if frame.positions else None,
            rows=list(frame.rows),
            length=frame.length,
            keep=not frame.drop,
        )
        seconds = time.perf_counter() - started
        check_finite(output_BTD, "the trunk's output", advice=OVERFLOW)
        self.tokens += B * T
        return pb.Generated(
            number=frame.number,
            activations=self._codecs.h2.encode(output_BTD, mask_BT, frame.number, 0, parcel),
            seconds=max(0.0, seconds - cache.queued),
            queued=cache.queued,
            cache_bytes=cache.bytes,
        )

    def _begun(self, frame: pb.Generate) -> Cached:
        """The session's cache, with its first frame a new one."""
        if frame.fork and frame.number != 1:
            raise TrunkError(f"frame {frame.number} begins with another session", kind="order")
        if frame.fork and _client(frame.fork) != _client(self.key):
            raise TrunkError("a session cannot begin with another client's", kind="refused")
        if self._cache is None:
            self._cache = self.engine.open(self.key, fork=frame.fork)
        return self._cache


def _checked(frame: pb.Generate, cache: Cached) -> tuple[int, int]:
    """B and T; `TrunkError` before memory is taken for what does not fit."""
    shape = shape_of(frame.activations, "activations")
    cache.check_shape(shape, len(frame.rows), frame.length)
    if frame.positions and len(frame.positions) != shape[0] * shape[1]:
        raise TrunkError(
            f"{len(frame.positions)} positions came with activations of shape {shape}",
            kind="shape",
        )
    return shape[0], shape[1]


def seed_of(session: str) -> int:
    """What the codecs of a session of this name draw from."""
    return derive_seed(session, "codec")


def _client(session: str) -> str:
    return session.partition("/")[0]
