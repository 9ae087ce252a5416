"""How well plans foretell: memory, bytes and seconds of steps of several families."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch

from conf.load import from_json, to_json
from conf.schema import Config
from flower_app.build import build_client, build_trunk
from flower_app.client.place import Place
from flower_app.client.streamed import Trainer
from simulations.bench.worker import worker
from simulations.network import relay
from simulations.plan.families import VOCABULARY, family_config
from simulations.plan.footprint import client_footprint, server_footprint
from simulations.plan.hollow import read_shape
from simulations.plan.measured import measure_step
from simulations.plan.plan import Planner, Setting
from simulations.plan.rehearsal import STEPS, alone, make_batch
from simulations.plan.seconds import Network
from strategies.engine.engine import TrunkEngine
from strategies.memory import peak_bytes
from strategies.transport import tickets
from strategies.transport.stream.link import GrpcLink
from strategies.transport.stream.service import TrunkService
from strategies.transport.tickets import Guest, Ticket

BOUNDS = {"memory": 0.1, "bytes": 0.1, "step": 0.2}
"""Largest relative error of each."""

LOOPBACK = Network(bandwidth=1e11, latency=7e-4)

LORA = [f"tuning.{role}=lora" for role in ("bottom", "trunk", "top")]
SIZES = ["cut.bottom=2", "cut.top=1", "train.batch_size=4", "data.context=128"]
CASES: dict[str, tuple[str, int, int, list[str]]] = {
    "llama": ("llama", 256, 6, []),
    "gpt2": ("gpt2", 256, 6, []),
    "qwen3-bf16-wire": ("qwen3", 256, 5, ["data.context=192", "link.codec=bf16"]),
    "gemma2": ("gemma2", 256, 6, []),
    "phi-micro-batches": ("phi", 256, 5, ["train.accumulate=2"]),
    "opt-lora": ("opt", 384, 5, LORA),
    "mixtral": ("mixtral", 256, 5, []),
    "llama-far": ("llama", 256, 6, ["train.accumulate=4", "link.codec=int4", "link.window=4"]),
}
"""Family, width, blocks, and what else is set."""

FAR = {"llama-far": Network(bandwidth=1e8, latency=0.05)}
"""Cases over another network than loopback."""

KEYS = {
    "client_mb": "client MB",
    "server_mb": "server MB",
    "up_mb": "MB up",
    "down_mb": "MB down",
    "step_s": "step s",
    "cpu_s": "processors s",
}
"""What is held against a plan."""

TURNS = 3
"""Times that a step is foretold and taken, in turn: a machine is not always equally fast."""


def bench_plan(
    steps: int = 5, names: Sequence[str] = (), say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Predict and measure a step of each case; one torch thread in each process.

    Memory is that of torch's tensors, of client and trunk each. Bytes are those of frames over a
    real gRPC stream between two processes; so are the seconds, of a clock on the wall.

    Parameters
    ----------
    steps : int
        Timed steps of each case, in each of `TURNS` turns.
    names : sequence of str
        Of `CASES`; none: all of them.
    say : callable
        Told of each case before it is measured.

    Returns
    -------
    dict
        For each case plan, real and ratio: of bytes, of a step's seconds, and of what both
        processes' processors worked meanwhile (``cpu_s``), which does not hang on who else uses
        the machine, and has no bound. The worst error of each kind;
        ``within``, whether all of them are within `BOUNDS`. ``resident``: of the first case, how
        much a fresh process grew that took the steps of both sides.

    Raises
    ------
    ValueError
        If there is no such case.
    """
    if unknown := [name for name in names if name not in CASES]:
        raise ValueError(f"no case {', '.join(unknown)}: there are {', '.join(CASES)}")
    names = list(names or CASES)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _trunk_process() as trunk:
            cases = {}
            for name in names:
                say(name)
                network = FAR.get(name, LOOPBACK)
                with _between(trunk, network, _config(name)) as invitation:
                    cases[name] = _case(_config(name), network, invitation, trunk.pid, steps)
    finally:
        torch.set_num_threads(before)
    errors = {kind: max(_errors(cases.values(), kind)) for kind in BOUNDS}
    say("memory from outside")
    return {
        "benchmark": "plan",
        "threads": 1,
        "steps": steps,
        "cases": cases,
        "resident": {names[0]: _resident(names[0])},
        "worst": {kind: round(error, 4) for kind, error in errors.items()},
        "bounds": BOUNDS,
        "within": all(errors[kind] <= bound for kind, bound in BOUNDS.items()),
    }


def _config(name: str) -> Config:
    family, width, blocks, overrides = CASES[name]
    threads = ["runtime.client_threads=1", "runtime.trunk_threads=1"]
    return family_config(family, width, blocks, [*SIZES, *threads, *overrides])


@contextmanager
def _between(trunk: _Trunk, network: Network, config: Config) -> Iterator[tuple[Ticket, bytes]]:
    """What the trunk's process invites a client with, over a network."""
    trunk.pipe.send(to_json(config))
    ticket, node_key = trunk.pipe.recv()
    if network is LOOPBACK:
        yield ticket, node_key
        return
    slow = relay.Network(rtt=network.latency, bandwidth=network.bandwidth)
    with worker(relay.serve, ticket.address, slow) as (pipe, _):
        yield replace(ticket, address=pipe.recv()), node_key


def _case(
    config: Config, network: Network, invitation: tuple[Ticket, bytes], trunk: int, steps: int
) -> dict[str, Any]:
    client = _Client(config, invitation, trunk)
    planner = Planner(config, Setting(network=network, clients=1))
    turns = []
    for turn in range(TURNS):
        if turn:
            planner.time()
        foretold, spent = planner.seconds(), client.time(steps)
        work = foretold.client + foretold.server + foretold.framing
        turns.append((foretold.total, spent.wall, work, spent.cpu))
    step, wall, work, cpu = (statistics.median(each) for each in zip(*turns, strict=True))
    client.link.close()
    held = measure_step(config, VOCABULARY)
    pairs = {
        "client_mb": (planner.memory.client(planner.cut).peak / 1e6, held.client_peak / 1e6),
        "server_mb": (planner.memory.server_peak(planner.cut) / 1e6, held.server_peak / 1e6),
        "up_mb": (planner.frames.up / 1e6, client.up / 1e6),
        "down_mb": (planner.frames.down / 1e6, client.down / 1e6),
        "step_s": (step, wall),
        "cpu_s": (work, cpu),
    }
    case: dict[str, Any] = {
        name: {"plan": a, "real": b, "ratio": a / b} for name, (a, b) in pairs.items()
    }
    return case | {"turns": turns}


def _errors(cases: Any, kind: str) -> list[float]:
    names = {"memory": ("client_mb", "server_mb"), "bytes": ("up_mb", "down_mb")}
    keys = names.get(kind, ("step_s",))
    return [abs(case[key]["ratio"] - 1) for case in cases for key in keys]


@dataclass(frozen=True, kw_only=True)
class _Spent:
    """Seconds of a step: of a clock on the wall, and of both processors."""

    wall: float
    cpu: float


class _Client:
    """The client of a case, its trunk in another process."""

    def __init__(self, config: Config, invitation: tuple[Ticket, bytes], trunk: int) -> None:
        ticket, node_key = invitation
        bottom, top = build_client(config)
        self.link = GrpcLink(ticket, node_key, steps=STEPS, config=config.link)
        place = Place(seed=0, client="bench", round=1, rounds=1)
        train, window = alone(config.train), config.link.window
        self._trainer = Trainer(bottom, top, self.link, STEPS, train, place, window=window)
        rows, tokens = config.train.batch_size, config.data.context
        self._batches = [
            make_batch(rows, tokens, VOCABULARY) for _ in range(config.train.accumulate)
        ]
        self._number, self._trunk = 0, psutil.Process(trunk)
        self.up = self.down = 0

    def time(self, steps: int) -> _Spent:
        """Time so many steps in a row, between one that warms up and one that is the last."""
        self._step()
        before = self._processors()
        wall = statistics.median(self._step() for _ in range(steps))
        cpu = (self._processors() - before) / steps
        self._step(last=True)
        return _Spent(wall=wall, cpu=cpu)

    def _step(self, last: bool = False) -> float:
        """Take one, and note its bytes."""
        up, down = self.link.bytes_up, self.link.bytes_down
        started = time.perf_counter()
        self._trainer.step(self._number, self._batches, None if last else self._batches)
        spent = time.perf_counter() - started
        if not last:  # which sends nothing of a next one
            self.up, self.down = self.link.bytes_up - up, self.link.bytes_down - down
        self._number += 1
        return spent

    def _processors(self) -> float:
        """Seconds that both processes have computed."""
        trunk = self._trunk.cpu_times()
        return time.process_time() + float(trunk.user + trunk.system)


@dataclass(frozen=True, kw_only=True)
class _Trunk:
    """The other process, and the way to it."""

    pipe: Connection
    pid: int


@contextmanager
def _trunk_process() -> Iterator[_Trunk]:
    """A process that serves the trunk of each configuration that it is sent, one after another."""
    with worker(_serve) as (pipe, process):
        assert process.pid is not None
        yield _Trunk(pipe=pipe, pid=process.pid)


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    service: TrunkService | None = None
    while True:
        try:
            config = from_json(pipe.recv())
        except EOFError:
            break
        if service is not None:
            service.stop()
        service, invitation = _offer(config)
        pipe.send(invitation)
    if service is not None:
        service.stop()


def _offer(config: Config) -> tuple[TrunkService, tuple[Ticket, bytes]]:
    trunk = build_trunk(config)
    engine = TrunkEngine(trunk, hidden_size=trunk.hidden_size, train=alone(config.train))
    engine.open_round(1, 1, training=True)
    service = TrunkService(engine, config.link)
    service.start()
    node_key = tickets.new_key()
    guest = Guest(key="bench", client="bench", public_key=tickets.public_half(node_key))
    return service, (service.ticket(guest), node_key)


def _resident(name: str) -> dict[str, float]:
    """Growth of a fresh process that takes steps of both sides, beside the sum of both plans."""
    config = _config(name)
    shape = read_shape(config)
    planned = client_footprint(shape, config).peak + server_footprint(shape, config).peak
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown = pool.apply(_grow, (to_json(config),))
    return {
        "plan_mb": round(planned / 1e6, 1),
        "grown_mb": round(grown / 1e6, 1),
        "ratio": round(planned / grown, 3),
    }


def _grow(text: str) -> int:
    torch.set_num_threads(1)
    small = family_config("llama", 64, 4, ["train.batch_size=1", "data.context=8"])
    measure_step(small, VOCABULARY)  # what libraries take at first is not what is measured
    before = peak_bytes()
    measure_step(from_json(text), VOCABULARY)
    return peak_bytes() - before


def columns(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each case: predicted / measured = ratio."""
    rows = [
        [name, *(f"{c[k]['plan']:.3g} / {c[k]['real']:.3g} = {c[k]['ratio']:.2f}" for k in KEYS)]
        for name, c in result["cases"].items()
    ]
    return ["plan / real", *KEYS.values()], rows
