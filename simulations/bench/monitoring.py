"""What monitoring costs: steps that are recorded and tracked, and steps that are not, in pairs."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conf.schema import Config, LinkConfig, OutputConfig, TrackingConfig, TrainConfig
from flower_app.metrics.run import RunMetrics
from flower_app.metrics.serve import new_registry, served
from flower_app.metrics.trunk import TrunkMetrics
from flower_app.runs.recorder import Recorder
from models import split
from simulations.bench.step import CUT, SIZES, SplitStep, make_batch, make_model
from simulations.bench.worker import worker
from strategies.engine.engine import TrunkEngine
from strategies.engine.meter import SILENT, Meter
from strategies.events import Event, StepDone
from strategies.transport import tickets
from strategies.transport.conversation import StepReport
from strategies.transport.stream.service import TrunkService
from strategies.transport.tickets import Guest, Ticket

KINDS = ("plain", "monitored")
SCRAPE = 5.0
"""Seconds between two scrapes; Prometheus' own default is 15."""


def bench_monitoring(steps: int = 200, warmup: int = 10) -> dict[str, Any]:
    """Time split steps with journal, console, TensorBoard and Prometheus, and without any.

    One client drives two trunks in one other process, over real gRPC, a step of each in turn;
    which is first changes with every pair. One torch thread in each process.

    Parameters
    ----------
    steps : int
        Timed steps of each kind.
    warmup : int
        Steps of each kind before the clock starts.

    Returns
    -------
    dict
        Median seconds of both, the median difference within pairs as a share of the plain step with
        its 95 % interval (bootstrap), and the seconds that a step waits for whoever is told of it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times, waited = _measure(steps, warmup)
    finally:
        torch.set_num_threads(before)
    plain, monitored = (np.array(times[kind][warmup:]) for kind in KINDS)
    base, draws = float(np.median(plain)), np.random.default_rng(0)
    picked = draws.integers(0, steps, (2000, steps))
    low, high = np.quantile(np.median((monitored - plain)[picked], axis=1) / base, [0.025, 0.975])
    return {
        "benchmark": "monitoring",
        **SIZES,
        "cut": str(CUT),
        "sinks": ["journal", "console", "tensorboard", "prometheus"],
        "steps": steps,
        "plain_seconds": round(base, 5),
        "monitored_seconds": round(float(np.median(monitored)), 5),
        "cost": round(float(np.median(monitored - plain)) / base, 5),
        "cost_low": round(float(low), 5),
        "cost_high": round(float(high), 5),
        "waited_seconds_per_step": round(waited, 6),
        "waited_share": round(waited / base, 5),
    }


def _measure(steps: int, warmup: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each step by kind, and the median seconds that a step waited to be told."""
    total, train, link = steps + warmup, TrainConfig(lr=1e-4), LinkConfig()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with _trunks(train, link) as (pipe, told):
        batch = make_batch()
        clients = {
            kind: SplitStep(train, link, [batch], ticket, key, total)
            for kind, (ticket, key) in told.items()
        }
        for index in range(total):
            for kind in KINDS if index % 2 else reversed(KINDS):
                started = time.perf_counter()
                clients[kind](index)
                times[kind].append(time.perf_counter() - started)
        for client in clients.values():
            client.link.close()
        pipe.send("waited")
        waited: list[float] = pipe.recv()
    return times, statistics.median(waited[warmup:])


@contextmanager
def _trunks(
    train: TrainConfig, link: LinkConfig
) -> Iterator[tuple[Connection, dict[str, tuple[Ticket, bytes]]]]:
    """A process that serves both trunks; yields the pipe to it, and a ticket and key for each."""
    with worker(_serve, train, link, patience=60) as (pipe, _):
        yield pipe, pipe.recv()


def _serve(pipe: Connection, train: TrainConfig, link: LinkConfig) -> None:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        monitor = _Monitor(train, stack)
        told = {}
        for kind, meter in zip(KINDS, (SILENT, monitor.meter), strict=True):
            service, key = _service(train, link, meter, stack), tickets.new_key()
            if kind == "monitored":
                service.on_step = monitor.on_step
            guest = Guest(key=kind, client="bench", public_key=tickets.public_half(key))
            told[kind] = service.ticket(guest), key
        pipe.send(told)
        pipe.recv()
        pipe.send(monitor.waited)
        monitor.finish()


def _service(train: TrainConfig, link: LinkConfig, meter: Meter, stack: ExitStack) -> TrunkService:
    trunk = split(make_model(), CUT).trunk
    engine = TrunkEngine(trunk, hidden_size=trunk.hidden_size, train=train, meter=meter)
    if isinstance(meter, TrunkMetrics):
        meter.attach(engine)
    engine.open_round(1, 1, training=True)
    service = TrunkService(engine, link)
    service.start()
    stack.callback(service.stop)
    return service


class _Monitor:
    """All that a run with TensorBoard and Prometheus has to be told."""

    def __init__(self, train: TrainConfig, stack: ExitStack) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config = replace(
            Config(),
            train=train,
            output=OutputConfig(folder=folder),
            tracking=TrackingConfig(sinks=("tensorboard",)),
        )
        console = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, console)
        self.recorder = Recorder(
            config, folder=Path(folder) / "run", say=lambda line: _say(console, line)
        )
        registry = new_registry()
        self.meter = TrunkMetrics(registry)
        self._run = RunMetrics(registry, config, self.recorder.folder)
        where = stack.enter_context(served(registry, "127.0.0.1", 0))
        over = threading.Event()
        threading.Thread(target=_scrape, args=(where, over), daemon=True).start()
        stack.callback(over.set)
        self.recorder.start()
        self.waited: list[float] = []

    def on_step(self, report: StepReport) -> None:
        """Tell of a step, as the strategy does."""
        started = time.perf_counter()
        facts = {**vars(report), "round": 1, "attempt": 1, "step": report.step + 1}
        del facts["key"]
        event: Event = StepDone(**facts)
        self.recorder(event)
        self._run(event)
        self.waited.append(time.perf_counter() - started)

    def finish(self) -> None:
        """End the run, which waits for TensorBoard."""
        self.recorder.fail("the benchmark is over")


def _say(console: int, line: str) -> None:
    os.write(console, f"{line}\n".encode())


def _scrape(where: str, over: threading.Event) -> None:
    """Ask for the metrics now and then, as Prometheus does."""
    while not over.wait(SCRAPE):
        with urllib.request.urlopen(where, timeout=SCRAPE) as answer:
            answer.read()
