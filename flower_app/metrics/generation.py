"""The metrics of a server of trunks that generate, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Gauge

from flower_app.metrics.trunk import TrunkMetrics
from strategies.generation.engine import GenerationEngine
from strategies.generation.memory import MIB, Memory
from strategies.transport.stream.generation import GenerationService


class GenerationMetrics(TrunkMetrics):
    """A trunk's metrics, and what sessions of generation hold and wait for."""

    def attach_server(
        self, service: GenerationService, engines: Sequence[GenerationEngine], memory: Memory
    ) -> None:
        """Have what the server knows of itself read whenever Prometheus asks."""
        told = (
            ("sessions", "Sessions that are open.", service.sessions),
            ("kv_bytes", "Keys and values of all sessions.", lambda: memory.bytes),
            ("kv_limit_bytes", "Most of these (--kv-mb).", lambda: memory.limits.total_mb * MIB),
            ("queue", "Forwards that wait for the trunk.",
             lambda: sum(engine.waiting for engine in engines)),
        )  # fmt: skip
        for name, words, value in told:
            Gauge(f"graft_trunk_{name}", words, registry=self._registry).set_function(value)
