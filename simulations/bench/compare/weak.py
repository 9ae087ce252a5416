"""Weak clients: how long a step takes if the clients compute k times slower, on a slow line.

What is emulated: after each piece of a client's compute it sleeps k - 1 times as long as that took
of processor time, and the stream goes through a `Relay` of a given bandwidth. The trunk, the wire
and the weights are the real ones; trunk and clients are processes of one thread each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from conf.load import from_json, to_json
from conf.schema import Config, TrainConfig
from flower_app.build import build_client, build_trunk
from flower_app.client import streamed
from flower_app.client.ends import Clock, Ends
from flower_app.client.place import Place
from simulations.bench.compare.fedavg.app import load_model, plain_optimizer, train_steps
from simulations.bench.compare.flops import full_batch
from simulations.bench.worker import worker
from simulations.network.relay import Network, Relay
from strategies.engine.engine import TrunkEngine
from strategies.transport import tickets
from strategies.transport.link import Link
from strategies.transport.stream.link import GrpcLink
from strategies.transport.stream.service import TrunkService
from strategies.transport.tickets import Guest, Ticket

WARMUP = 1
"""Steps of each point before the clock starts."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a client is to do: train for some steps, `slow` times slower."""

    slow: float
    steps: int
    ticket: Ticket | None = None
    """None: the whole model, alone."""
    node_key: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Seconds of a step, medians over steps and clients."""

    step: float
    client: float
    """Processor time of the client, as if it were not slow."""
    trunk: float = 0.0
    """Of the trunk for this client."""
    bytes_up: float = 0.0
    bytes_down: float = 0.0


class Slow:
    """Makes what is done within it take `factor` times its processor time longer."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self.seconds = 0.0
        """Of processor time, in all."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        began = time.thread_time()
        yield
        used = time.thread_time() - began
        self.seconds += used
        time.sleep((self._factor - 1) * used)


class _SlowClock(Clock):
    def __init__(self, slow: Slow) -> None:
        super().__init__()
        self._slow = slow

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with super().__call__(name), self._slow():
            yield


class _SlowEnds(Ends):
    """Ends on a weak machine."""

    def __init__(self, slow: Slow, *ends: Any) -> None:
        super().__init__(*ends)
        self._slow, self.clock = slow, _SlowClock(slow)

    def take_step(self, step: int, square: float) -> None:
        with self._slow():
            super().take_step(step, square)


class SlowTrainer(streamed.Trainer):
    """Takes a client's steps on a weak machine; arguments are those of `streamed.Trainer`."""

    def __init__(
        self,
        slow: Slow,
        bottom: Any,
        top: Any,
        link: Link,
        count: int,
        config: TrainConfig,
        place: Place,
    ) -> None:
        super().__init__(bottom, top, link, count, config, place)
        self._ends = _SlowEnds(slow, bottom, top, count, config, place)


class Emulation:
    """One trunk and several clients, each a process that waits for work; a context manager.

    Parameters
    ----------
    config : Config
        Of `config_of`, for splitfed-v1.
    steps : int
        Timed steps of each point.
    """

    def __init__(self, config: Config, steps: int) -> None:
        self._count = steps + WARMUP
        train = replace(config.train, local_steps=self._count)
        self._config = replace(config, train=train)
        self._stack = ExitStack()

    def __enter__(self) -> Emulation:
        text, clients = to_json(self._config), self._config.federation.min_clients
        self._trunk = self._stack.enter_context(worker(_serve, text))[0]
        self._clients = [self._stack.enter_context(worker(_work, text))[0] for _ in range(clients)]
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def unsplit(self, slow: float) -> Point:
        """Each client trains the whole model."""
        return self._train([Job(slow=slow, steps=self._count)] * len(self._clients))

    def split(self, slow: float, megabits: float = 0.0) -> Point:
        """All clients train with one trunk, over lines of so many Mbit/s; 0: over loopback."""
        keys = [tickets.new_key() for _ in self._clients]
        self._trunk.send([tickets.public_half(key) for key in keys])
        given: list[Ticket] = self._trunk.recv()
        with ExitStack() as stack:
            if megabits:
                line = Network(bandwidth=megabits * 1e6)
                relays = [stack.enter_context(Relay(each.address, line)) for each in given]
                given = [
                    replace(ticket, address=relay.address)
                    for ticket, relay in zip(given, relays, strict=True)
                ]
            jobs = [
                Job(slow=slow, steps=self._count, ticket=ticket, node_key=key)
                for ticket, key in zip(given, keys, strict=True)
            ]
            point = self._train(jobs)
        self._trunk.send("over")
        self._trunk.recv()
        return point

    def _train(self, jobs: Sequence[Job]) -> Point:
        for pipe, job in zip(self._clients, jobs, strict=True):
            pipe.send(job)
        try:
            rows = [row for pipe in self._clients for row in pipe.recv()]
        except EOFError:
            raise RuntimeError("a client's process died; its error stands above") from None
        return Point(**{name: statistics.median(row[name] for row in rows) for name in rows[0]})


def _serve(pipe: Connection, text: str) -> None:
    """The trunk's process: a round for each list of keys that comes."""
    torch.set_num_threads(1)
    config = from_json(text)
    trunk, train = build_trunk(config), replace(config.train, rounds=10**6)
    engine = TrunkEngine(trunk, hidden_size=trunk.hidden_size, train=train, seed=config.seed)
    service = TrunkService(engine, config.link)
    service.start()
    try:
        for number in range(1, train.rounds):
            names = {f"{number}-{i}": key for i, key in enumerate(pipe.recv())}
            engine.open_round(number, train.rounds, training=True, cohort=len(names))
            guests = [Guest(key=n, client=n, public_key=key) for n, key in names.items()]
            pipe.send([service.ticket(guest) for guest in guests])
            pipe.recv()
            service.end_round()
            engine.close_round()
            pipe.send("closed")
    except EOFError:
        service.stop()


def _work(pipe: Connection, text: str) -> None:
    """A client's process: a job at a time."""
    torch.set_num_threads(1)
    config = from_json(text)
    whole, ends = load_model(config), build_client(config)
    try:
        while True:
            job = pipe.recv()
            pipe.send(_unsplit(config, whole, job) if job.ticket is None
                      else _split(config, ends, job))  # fmt: skip
    except EOFError:
        return


def _unsplit(config: Config, whole: Any, job: Job) -> list[dict[str, float]]:
    slow, optimizer = Slow(job.slow), plain_optimizer(whole, config.train)
    rows = []
    for _ in range(job.steps):
        began, before = time.perf_counter(), slow.seconds
        with slow():
            train_steps(whole, [[full_batch(config)]], config.train, optimizer)
        rows.append({"step": time.perf_counter() - began, "client": slow.seconds - before})
    return rows[WARMUP:]


def _split(config: Config, ends: Any, job: Job) -> list[dict[str, float]]:
    assert job.ticket is not None
    slow, train = Slow(job.slow), config.train
    link = GrpcLink(job.ticket, job.node_key, steps=job.steps, config=config.link)
    trainer = SlowTrainer(slow, ends[0], ends[1], link, job.steps, train, _place())
    rows = []
    for step in range(job.steps):
        began, before = time.perf_counter(), _so_far(slow, link)
        trainer.step(step, [full_batch(config)])
        now = {name: value - before[name] for name, value in _so_far(slow, link).items()}
        rows.append({"step": time.perf_counter() - began, **now})
    link.close()
    return rows[WARMUP:]


def _so_far(slow: Slow, link: GrpcLink) -> dict[str, float]:
    return {
        "client": slow.seconds,
        "trunk": link.trunk_seconds,
        "bytes_up": link.bytes_up,
        "bytes_down": link.bytes_down,
    }


def _place() -> Place:
    return Place(seed=0, client="weak", round=1, rounds=1)


def predicted_split(
    one: Point, *, slow: float, megabits: float, clients: int, cores: int, overhead: float
) -> float:
    """Seconds of a split step by formula.

    A client waits for its own compute, the line, and the trunk, in turn; the trunk takes as many
    clients at once as it has cores.

    Parameters
    ----------
    one : Point
        Measured with clients that are not slow.
    slow, megabits : float
        The point that is predicted.
    clients, cores : int
        Who share the trunk, and its cores.
    overhead : float
        Seconds of a step that are neither compute nor transfer, measured over loopback.
    """
    wire = 8 * (one.bytes_up + one.bytes_down) / (megabits * 1e6)
    alone = slow * one.client + one.trunk + wire + overhead
    return max(alone, clients * one.trunk / cores)
