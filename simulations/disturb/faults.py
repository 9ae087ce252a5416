"""Faults on the way between a client and the trunk: an interceptor that disturbs frames."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

KINDS = ("lose", "duplicate", "reorder", "truncate", "corrupt", "delay", "break")
"""What can happen to a frame. `reorder` holds it back until the next one has passed; `break` cuts
the stream in its place."""

UP, DOWN = "up", "down"
Schedule = Mapping[tuple[str, int], str]
"""Which frame, by direction and its number from 0 over all streams of a link, meets which fault."""


def draw_schedule(seed: int | str, frames: int, rate: float) -> Schedule:
    """Draw faults for both directions of a link.

    Parameters
    ----------
    seed : int or str
        Equal seeds draw alike.
    frames : int
        How many frames of each direction may meet one.
    rate : float
        Share of the frames that do.
    """
    chance = random.Random(seed)
    return {
        (way, number): chance.choice(KINDS)
        for way in (UP, DOWN)
        for number in range(frames)
        if chance.random() < rate
    }


@dataclass
class Faults(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
    """Disturbs the frames of one link, over all its streams.

    Parameters
    ----------
    schedule : mapping
        See `Schedule`.
    delay : float
        Seconds that `delay` takes.
    """

    schedule: Schedule
    delay: float = 0.5
    met: Counter[str] = field(default_factory=Counter)
    """How many frames met each kind so far."""

    def __post_init__(self) -> None:
        self._passed = Counter[str]()
        self._lock = threading.Lock()

    def intercept_stream_stream(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Iterator[bytes],
    ) -> Iterator[bytes]:
        """Put the faults between gRPC and the link, on both ways."""
        calls: list[Any] = []

        def cut() -> None:
            while not calls:  # the first frame may be faster than the call's own return
                time.sleep(0.001)
            calls[0].cancel()

        calls.append(continuation(client_call_details, self._pass(request_iterator, UP, cut)))
        return self._pass(calls[0], DOWN, cut)

    def _pass(self, frames: Iterable[bytes], way: str, cut: Callable[[], None]) -> Iterator[bytes]:
        held: list[bytes] = []
        for raw in frames:
            kind = self._fault(way)
            if kind == "break":
                cut()
            elif kind == "reorder":
                held.append(raw)
            elif kind != "lose":
                yield from self._disturbed(raw, kind)
                yield from held
                held.clear()

    def _fault(self, way: str) -> str:
        with self._lock:
            kind = self.schedule.get((way, self._passed[way]), "")
            self._passed[way] += 1
            if kind:
                self.met[kind] += 1
        return kind

    def _disturbed(self, raw: bytes, kind: str) -> Iterator[bytes]:
        if kind == "truncate":
            yield raw[: len(raw) // 2]
        elif kind == "corrupt":
            middle = len(raw) // 2
            yield raw[:middle] + bytes([raw[middle] ^ 0x10]) + raw[middle + 1 :]
        else:
            if kind == "delay":
                time.sleep(self.delay)
            yield raw
        if kind == "duplicate":
            yield raw
