"""A trunk's metrics for Prometheus, whatever it is served for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from strategies.engine.engine import TrunkEngine
from strategies.engine.meter import Meter

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Seconds."""


class TrunkMetrics(Meter):
    """Counts what the sessions of one trunk do.

    Parameters
    ----------
    registry : CollectorRegistry
        Where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"graft_trunk_{name}", words, labels, registry=registry)

        def histogram(name: str, words: str, *labels: str) -> Histogram:
            name = f"graft_trunk_{name}_seconds"
            return Histogram(name, words, labels, registry=registry, buckets=BUCKETS)

        self._work = histogram(
            "work", "Time in the trunk alone, for a micro-batch or step.", "work"
        )
        self._frames = histogram("frame", "Time to answer a frame, waiting included.", "frame")
        self._busy = Gauge(
            "graft_trunk_frames_in_progress",
            "Frames that are answered now or wait for their turn.",
            registry=registry,
        )
        self._sessions = counter("sessions_opened", "Sessions that were opened.")
        self._micro_batches = counter("micro_batches", "Micro-batches that went forward.")
        self._tokens = counter("tokens", "Tokens that went forward, padding not counted.")
        self._steps = counter("steps", "Optimizer steps that sessions took part in.")
        self._bytes = counter(
            "bytes", "Bytes of frames, from clients (up) and to them.", "direction"
        )
        self._failures = counter("failures", "Frames that could not be served.", "kind")
        self._connections = counter("connections", "Clients that were let in.")
        self._reconnects = counter("reconnects", "Of these, clients whose stream had broken.")
        self._refused = counter("refused", "Connections without a token that holds.")
        self._up, self._down = self._bytes.labels("up"), self._bytes.labels("down")
        for kind in ("forward", "backward", "step"):
            self._work.labels(kind)

    def attach(self, engine: TrunkEngine) -> None:
        """Have what the engine knows of itself read whenever Prometheus asks."""
        told = (
            ("sessions", "Sessions that are open.", engine.sessions),
            ("in_flight_bytes", "Activations and replies that wait for their step.",
             lambda: engine.in_flight.bytes),
            ("in_flight_limit_bytes", "Most of these (link.max_in_flight_mb).",
             lambda: engine.in_flight.limit),
        )  # fmt: skip
        for name, words, value in told:
            gauge = Gauge(f"graft_trunk_{name}", words, registry=self._registry)
            gauge.set_function(value)

    def opened(self) -> None:
        """Count a session."""
        self._sessions.inc()

    def work(self, kind: str, tokens: int = 0) -> AbstractContextManager[Any]:
        """Time the trunk alone, and count what it does."""
        if kind == "forward":
            self._micro_batches.inc()
            self._tokens.inc(tokens)
        elif kind == "step":
            self._steps.inc()
        timer: AbstractContextManager[Any] = self._work.labels(kind).time()
        return timer

    def frame(self, verb: str) -> AbstractContextManager[Any]:
        """Time the answer to a frame, and count it as long as it is at work."""
        return _InProgress(self._busy, self._frames.labels(verb))

    def received(self, size: int) -> None:
        """Count bytes up."""
        self._up.inc(size)

    def sent(self, size: int) -> None:
        """Count bytes down."""
        self._down.inc(size)

    def failed(self, kind: str) -> None:
        """Count a failure by its kind."""
        self._failures.labels(kind).inc()

    def connected(self, *, again: bool) -> None:
        """Count a connection."""
        self._connections.inc()
        if again:
            self._reconnects.inc()

    def refused(self) -> None:
        """Count a refusal."""
        self._refused.inc()


class _InProgress:
    """A frame that is at work."""

    def __init__(self, busy: Gauge, seconds: Histogram) -> None:
        self._busy, self._timer = busy, seconds.time()

    def __enter__(self) -> None:
        self._busy.inc()
        self._timer.__enter__()

    def __exit__(self, *error: object) -> None:
        self._timer.__exit__(*error)
        self._busy.dec()
