"""A run's metrics for Prometheus, of its events."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from conf.schema import Config
from strategies.events import Event, RoundDone, StepDone


class RunMetrics:
    """Told of a run's events, from several threads.

    Parameters
    ----------
    registry : CollectorRegistry
        Where the metrics are registered.
    config : Config
        The run's.
    folder : Path
        Its folder, whose name is the run's.
    """

    def __init__(self, registry: CollectorRegistry, config: Config, folder: Path) -> None:
        def gauge(name: str, words: str, *labels: str) -> Gauge:
            return Gauge(f"graft_run_{name}", words, labels, registry=registry)

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"graft_run_{name}", words, labels, registry=registry)

        info = gauge("info", "Always 1: what run this is.", "run", "experiment", "strategy")
        info.labels(folder.name, config.experiment, config.train.strategy).set(1)
        gauge("rounds", "Rounds that the run will have.").set(config.train.rounds)
        self._round = gauge("round", "The last round that is over.")
        self._seconds = gauge("round_seconds", "What it took.")
        self._loss = gauge("loss", "Its loss, nats per token.", "data")
        self._clients = gauge(
            "clients", "Its clients: who answered and counts, or is missing.", "who"
        )
        self._steps = counter("steps", "Clients' optimizer steps, abandoned attempts included.")
        self._tokens = counter("tokens", "Tokens that these steps trained on.")

    def __call__(self, event: Event) -> None:
        """Take in a step or a round."""
        if isinstance(event, StepDone):
            self._steps.inc()
            self._tokens.inc(event.tokens)
        elif isinstance(event, RoundDone):
            self._finish(event)

    def _finish(self, event: RoundDone) -> None:
        self._round.set(event.round)
        self._seconds.set(event.seconds)
        losses = {"train": event.train, "held-out": event.evaluate, "central": event.central}
        for data, metrics in losses.items():
            if metrics and "loss" in metrics:
                self._loss.labels(data).set(metrics["loss"])
        if event.training:
            self._clients.labels("counted").set(len(event.training.clients))
            self._clients.labels("missing").set(len(event.training.missing))
