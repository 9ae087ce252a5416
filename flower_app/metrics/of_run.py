"""The metrics of a run, if `runtime.metrics_port` asks for them; else nothing is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from conf.schema import Config
from flower_app.runs.recorder import Recorder
from strategies.engine.engine import TrunkEngine
from strategies.engine.meter import SILENT, Meter
from strategies.events import Event, Observer


@dataclass(frozen=True)
class Metrics:
    """What is told of the trunk's work, and of the run's events."""

    meter: Meter
    observer: Observer
    attach: Callable[[TrunkEngine], None] = lambda engine: None
    """Reads of the engine what it knows of itself."""


@contextmanager
def metrics_of(config: Config, recorder: Recorder) -> Iterator[Metrics]:
    """Serve the metrics of a run while it lasts.

    Raises
    ------
    ConfigError
        If the port is not free.
    """
    if not config.runtime.metrics_port:
        yield Metrics(SILENT, recorder)
        return
    from flower_app.metrics.run import RunMetrics
    from flower_app.metrics.serve import new_registry, served
    from flower_app.metrics.trunk import TrunkMetrics

    registry = new_registry(config.runtime.trunk_device)
    trunk, run = TrunkMetrics(registry), RunMetrics(registry, config, recorder.folder)

    def tell(event: Event) -> None:
        recorder(event)
        run(event)

    host, port = config.runtime.metrics_host, config.runtime.metrics_port
    with served(registry, host, port) as where:
        recorder.say(f"metrics: {where}")
        yield Metrics(trunk, tell, trunk.attach)
