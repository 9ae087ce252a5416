"""What a split step costs over a slow network, against the unsplit one: three processes."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from conf.schema import LinkConfig, TrainConfig
from conf.sections.link import read_codecs
from models import Cut, split
from simulations.bench.step import SplitStep, WholeStep, make_batch, make_model
from simulations.bench.worker import worker
from simulations.network import relay
from simulations.network.relay import Network
from strategies.engine.engine import TrunkEngine
from strategies.transport import tickets
from strategies.transport.codec.registry import find_codec
from strategies.transport.stream.service import TrunkService
from strategies.transport.tickets import Guest, Ticket

SIZES = {"blocks": 8, "hidden": 256, "vocabulary": 1024, "batch": 8, "tokens": 128}
"""Of the model, and of a micro-batch."""
CUT = Cut(bottom=1, top=1)
PHASES = ("bottom", "top", "trunk", "network")

ROW = 4
"""Steps of one kind in a row."""
PATIENCE = 3600.0
"""Seconds a session may be silent while others are timed."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is measured: a way to split, over a network."""

    rtt: float = 0.0
    """Seconds."""
    bandwidth: float | None = None
    """Bits a second, each way; None: as this machine is. With no `rtt` either there is no relay."""
    codec: str = "bf16"
    micros: int = 1
    """Micro-batches of a step, each of the whole batch's size."""
    window: int = 1
    """How many of them are under way at once."""

    @property
    def network(self) -> Network:
        """What is between client and trunk."""
        return Network(rtt=self.rtt, bandwidth=self.bandwidth)

    @property
    def key(self) -> str:
        """A name of its own for the session."""
        return f"{self.codec} {self.micros} {self.window}"


NEAR = Point()
QUICK = (
    NEAR,
    replace(NEAR, micros=4),
    Point(rtt=0.05, bandwidth=1e8),
    Point(rtt=0.05, bandwidth=1e8, micros=4),
    Point(rtt=0.1, bandwidth=1e9, micros=8),
)
"""The figures of docs/wire.md, in a few minutes."""

WAYS: Sequence[tuple[str, int]] = (("bf16", 1), ("int4", 4))
"""Codecs and windows of them."""

RTTS, BANDWIDTHS, MICROS = (0.0, 0.02, 0.05, 0.1, 0.2), (1e7, 1e8, 1e9), (1, 4, 8)
CODECS, WINDOWS = ("bf16", "int4"), (1, 4)
"""The whole grid."""


def points_of(
    full: bool,
    rtts: Sequence[float] = (),
    bandwidths: Sequence[float] = (),
    micros: Sequence[int] = (),
    codecs: Sequence[str] = (),
    windows: Sequence[int] = (),
) -> list[Point]:
    """What to measure: the quick points, or every combination of what is given, or of all."""
    places = [(each.rtt, each.bandwidth, each.micros) for each in QUICK]
    if full or rtts or bandwidths or micros:
        some = (RTTS, BANDWIDTHS, MICROS) if full else ((0.05,), (1e8,), (1, 4))
        places = list(itertools.product(rtts or some[0], bandwidths or some[1], micros or some[2]))
    ways: Sequence[tuple[str, int]] = WAYS
    if full or codecs or windows:
        ways = tuple(itertools.product(codecs or CODECS, windows or WINDOWS))
    found = {
        Point(rtt=rtt, bandwidth=bandwidth, codec=codec, micros=count, window=window)
        for (rtt, bandwidth, count), (codec, window) in itertools.product(places, ways)
    }
    return sorted(found, key=_order)


def link_config(point: Point) -> LinkConfig:
    """The link of a point, on both sides."""
    return LinkConfig(codec=read_codecs(point.codec), window=point.window, timeout=PATIENCE)


def bench_wire(
    points: Sequence[Point],
    turns: int = 3,
    say: Callable[[str], None] = lambda line: None,
    sizes: dict[str, int] = SIZES,
) -> dict[str, Any]:
    """Time split steps against unsplit ones, point by point of each network.

    Over one network all points take turns with the unsplit steps, so that whatever else the machine
    does meets all. AdamW runs in all parts; client, trunk and the unsplit model have one torch
    thread each, and the relay is a process besides.

    Parameters
    ----------
    points : sequence of Point
        What is measured.
    turns : int
        Of which the median is told: `ROW` steps of each point and the unsplit model, after one that
        warms up.
    say : callable
        Takes a line of progress.
    sizes : dict
        As `SIZES`.

    Returns
    -------
    dict
        The sizes, and `rows`: of each point median seconds of a split and an unsplit step, their
        ratio, seconds by phase (with the trunk's beside the client's where they overlap), bytes
        each way and the last losses' difference.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for network, group in itertools.groupby(sorted(points, key=_order), network_words):
            say(network)
            rows += _over_one_network(list(group), turns, sizes, say)
    finally:
        torch.set_num_threads(before)
    return {
        "benchmark": "wire",
        **sizes,
        "cut": str(CUT),
        "threads": 1,
        "turns": turns,
        "steps": turns * ROW,
        "rows": rows,
    }


def _order(point: Point) -> tuple[float | str, ...]:
    bandwidth = point.bandwidth or float("inf")
    return point.rtt, bandwidth, point.codec, point.window, point.micros


def network_words(point: Point) -> str:
    """What is between client and trunk."""
    limit = f"{point.bandwidth / 1e6:g} Mbit/s" if point.bandwidth else "no limit"
    return "loopback" if point.network == Network() else f"{1000 * point.rtt:g} ms, {limit}"


def _over_one_network(
    points: list[Point], turns: int, sizes: dict[str, int], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    total = 1 + turns * ROW
    batches = [make_batch(sizes, seed) for seed in range(max(point.micros for point in points))]
    with _trunk_process(points, sizes) as (found, node_key), ExitStack() as stack:
        far = _Far(stack, points[0].network)
        clients = {}
        for point in points:
            ticket = replace(found[point.key], address=far.address(found[point.key].address))
            clients[point] = _Timed(
                SplitStep(
                    _train(point.micros),
                    link_config(point),
                    batches[: point.micros],
                    ticket,
                    node_key,
                    total,
                    sizes,
                    CUT,
                )
            )
        wholes = {
            micros: WholeStep(_train(micros), batches[:micros], total, sizes)
            for micros in sorted({point.micros for point in points})
        }
        unsplit: dict[int, list[float]] = {micros: [] for micros in wholes}
        for turn, numbers in enumerate(
            [range(1), *(range(t, t + ROW) for t in range(1, total, ROW))]
        ):
            for micros, whole in wholes.items():
                started = time.perf_counter()
                for number in numbers:
                    whole(number)
                unsplit[micros].append((time.perf_counter() - started) / len(numbers))
                for point, client in clients.items():
                    if point.micros == micros:
                        client(numbers)
            say(f"  turn {turn} of {turns}")
        for client in clients.values():
            client.step.link.close()
    return [
        _row(point, client, unsplit[point.micros], wholes[point.micros].loss)
        for point, client in clients.items()
    ]


class _Timed:
    """Split steps, a few in a row, with what one of them took: in a row, as the next one may begin
    before one has ended."""

    def __init__(self, step: SplitStep) -> None:
        self.step = step
        self.taken: list[dict[str, float]] = []

    def __call__(self, numbers: range) -> None:
        before, started = self._counts(), time.perf_counter()
        for number in numbers:
            self.step(number, last=number == numbers[-1])
        after = {**self._counts(), "split": time.perf_counter() - started}
        spent = {name: after[name] - before.get(name, 0) for name in after}
        self.taken.append({name: value / len(numbers) for name, value in spent.items()})

    def _counts(self) -> dict[str, float]:
        link = self.step.link
        return {
            **{phase: self.step.trainer.seconds[phase] for phase in PHASES},
            "bytes_up": link.bytes_up,
            "bytes_down": link.bytes_down,
        }

    def median(self, name: str) -> float:
        return statistics.median(each[name] for each in self.taken[1:])


def _row(point: Point, client: _Timed, unsplit: list[float], loss: float) -> dict[str, Any]:
    own = {phase: client.median(phase) for phase in PHASES}
    split_s, unsplit_s = client.median("split"), statistics.median(unsplit[1:])
    # Of turns, as a machine may be slower for some of them.
    both = zip((each["split"] for each in client.taken[1:]), unsplit[1:], strict=True)
    ratio = statistics.median(one / other for one, other in both)
    waiting = split_s - own["bottom"] - own["top"]
    return {
        **asdict(point),
        "unsplit_seconds": round(unsplit_s, 4),
        "split_seconds": round(split_s, 4),
        "ratio": round(ratio, 3),
        **{f"{phase}_seconds": round(own[phase], 4) for phase in ("bottom", "top", "trunk")},
        "waiting_seconds": round(waiting, 4),
        "network_seconds": round(max(0.0, waiting - own["trunk"]), 4),
        "bytes_up": round(client.median("bytes_up")),
        "bytes_down": round(client.median("bytes_down")),
        "loss_difference": abs(client.step.loss - loss),
        "network": network_words(point),
    }


class _Far:
    """The same network before each service that clients connect to."""

    def __init__(self, stack: ExitStack, network: Network) -> None:
        self._stack, self._network, self._known = stack, network, dict[str, str]()

    def address(self, to: str) -> str:
        """Where to connect for a service at `to`; there itself, if nothing is between."""
        if self._network == Network():
            return to
        if to not in self._known:
            pipe, _ = self._stack.enter_context(worker(relay.serve, to, self._network))
            self._known[to] = pipe.recv()
        return self._known[to]


def _train(micros: int) -> TrainConfig:
    return TrainConfig(lr=1e-4, accumulate=micros)


@contextmanager
def _trunk_process(
    points: Iterable[Point], sizes: dict[str, int]
) -> Iterator[tuple[dict[str, Ticket], bytes]]:
    """A process that serves the trunk; yields a ticket for each point, and the key they are for."""
    for point in points:
        for name in set(read_codecs(point.codec).values()):
            find_codec(name)  # one that nobody offers is refused in this process, in words
    with worker(_serve, list(points), sizes) as (pipe, _):
        yield pipe.recv()


def _serve(pipe: Connection, points: list[Point], sizes: dict[str, int]) -> None:
    torch.set_num_threads(1)
    node_key, found, services = tickets.new_key(), {}, []
    for config, group in itertools.groupby(sorted(points, key=_order), key=link_config):
        mine = list(group)
        trunk = split(make_model(sizes), CUT).trunk
        train = _train(max(point.micros for point in mine))
        engine = TrunkEngine(trunk, hidden_size=trunk.hidden_size, train=train)
        engine.open_round(1, 1, training=True)
        service = TrunkService(engine, config)
        service.start()
        services.append(service)
        for point in mine:
            public = tickets.public_half(node_key)
            guest = Guest(key=point.key, client=point.key, public_key=public)
            found[point.key] = service.ticket(guest)
    pipe.send((found, node_key))
    try:
        pipe.recv()
    except EOFError:
        for service in services:
            service.stop()
