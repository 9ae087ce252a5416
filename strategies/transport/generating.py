"""What the trunk answers to the frames of a session that generates.

Legend: B rows, t new positions, D hidden size.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from strategies.engine.checks import check_finite
from strategies.engine.meter import Meter
from strategies.errors import TrunkError
from strategies.generation.memory import Limits
from strategies.generation.session import GONE, OVERFLOW
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.registry import crossings
from strategies.transport.codec.tensors import decode, shape_of
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
    codec : str
        How activations travel, as `link.dtype` names it.
    limit : int
        Largest frame, bytes.
    meter : Meter
        Told of the frames.
    """

    def __init__(self, key: str, engine: Engine, *, codec: str, limit: int, meter: Meter) -> None:
        super().__init__(meter, limit, ADVICE)
        self.key, self.engine, self._codec = key, engine, codec
        self._codecs = crossings(codec, key)
        self._cache: Cached | None = None
        self._kept: tuple[int, bytes] = (0, b"")
        self._number = 0
        self.ended = False
        self.tokens = 0

    def opened(self) -> pb.Opened:
        """What the trunk takes, and how."""
        return pb.Opened(
            hidden_size=self.engine.hidden_size,
            codec=self._codec,
            limit=self._limit,
            chunk=self.engine.limits.tokens,
        )

    def end(self) -> None:
        """Forget what is cached."""
        self.ended, self._cache, self._kept = True, None, (0, b"")
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
        if number == self._number and reply and checksum == zlib.crc32(raw):
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
            self._number, self._kept = frame.generate.number, (zlib.crc32(raw), reply)

    def _serve(self, body: str, frame: pb.ClientFrame, started: float) -> dict[str, Any]:
        if body == "generate":
            return {"generated": self._generate(frame.generate)}
        if body != "close":
            raise TrunkError(f"this trunk generates: '{body}' is none of its frames", kind="order")
        self.closed, self.left = not frame.close.early, frame.close.early
        self.end()
        return {"closed": pb.Closed(tokens=self.tokens)}

    def _generate(self, frame: pb.Generate) -> pb.Generated:
        cache = self._begun(frame)
        B, T = _checked(frame, cache)
        started = time.perf_counter()
        output_BTD = cache.forward(
            self._codecs.h1.decode(frame.activations, "activations"),
            mask_BT=decode(frame.mask, "mask", torch.bool) if frame.HasField("mask") else None,
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
            activations=self._codecs.h2.encode(output_BTD, frame.number, 0),
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
    if frame.HasField("mask") and (came := shape_of(frame.mask, "mask")) != shape[:2]:
        raise TrunkError(f"mask has shape {came}, activations {shape}", kind="shape")
    if frame.positions and len(frame.positions) != shape[0] * shape[1]:
        raise TrunkError(
            f"{len(frame.positions)} positions came with activations of shape {shape}",
            kind="shape",
        )
    return shape[0], shape[1]


def _client(session: str) -> str:
    return session.partition("/")[0]
