"""How well plans foretell: memory, bytes and seconds of steps of several families."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from conf.load import from_json, to_json
from conf.schema import Config
from flower_app.build import build_client, build_trunk
from flower_app.client.place import Place
from flower_app.client.streamed import Trainer
from simulations.plan.families import VOCABULARY, family_config
from simulations.plan.footprint import client_footprint, server_footprint
from simulations.plan.hollow import read_shape
from simulations.plan.measured import measure_step
from simulations.plan.plan import Setting, make_plan
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
CASES: dict[str, tuple[str, int, int, list[str]]] = {
    "llama": ("llama", 384, 8, ["train.batch_size=4", "data.context=128"]),
    "llama, lora": ("llama", 512, 6, ["train.batch_size=8", "data.context=128", *LORA]),
    "gpt2": ("gpt2", 256, 8, ["train.batch_size=4", "data.context=128"]),
    "qwen3, bf16 wire": (
        "qwen3",
        256,
        6,
        ["train.batch_size=8", "data.context=256", "link.dtype=bf16"],
    ),
    "gemma2": ("gemma2", 256, 6, ["train.batch_size=4", "data.context=128"]),
    "phi, 2 micro-batches": (
        "phi",
        256,
        6,
        ["train.batch_size=4", "data.context=128", "train.accumulate=2"],
    ),
    "opt, lora": ("opt", 384, 6, ["train.batch_size=4", "data.context=256", *LORA]),
    "mixtral": ("mixtral", 256, 6, ["train.batch_size=4", "data.context=128"]),
}
"""Family, width, blocks, and what else is set."""

RESIDENT = ("llama", "gpt2")
"""Cases whose processes are watched from outside as well."""


def bench_plan(steps: int = 8, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Predict and measure a step of each case; one torch thread in each process.

    Memory is that of torch's tensors, of client and trunk each. Bytes are those of frames over a
    real gRPC stream between two processes; so are the seconds.

    Parameters
    ----------
    steps : int
        Timed steps of each case.
    say : callable
        Told of each case before it is measured.

    Returns
    -------
    dict
        For each case plan, real and ratio; the worst error of each kind; ``within``, whether all
        of them are within `BOUNDS`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _trunk_process() as pipe:
            cases = {}
            for name, (family, width, blocks, overrides) in CASES.items():
                say(name)
                own = ["cut.bottom=2", "cut.top=1", *overrides]
                cases[name] = _case(family_config(family, width, blocks, own), pipe, steps)
    finally:
        torch.set_num_threads(before)
    errors = {kind: max(_errors(cases.values(), kind)) for kind in BOUNDS}
    resident = {name: _resident(name) for name in RESIDENT}
    return {
        "benchmark": "plan",
        "threads": 1,
        "steps": steps,
        "cases": cases,
        "resident": resident,
        "worst": {kind: round(error, 4) for kind, error in errors.items()},
        "bounds": BOUNDS,
        "within": all(errors[kind] <= bound for kind, bound in BOUNDS.items()),
    }


def _case(config: Config, pipe: Connection, steps: int) -> dict[str, Any]:
    plan = make_plan(config, Setting(network=LOOPBACK, clients=1))
    timed = _time_split(config, pipe, steps)
    held = measure_step(config, VOCABULARY)
    pairs = {
        "client_mb": (plan["client"]["peak"] / 1e6, held.client_peak / 1e6),
        "server_mb": (plan["server"]["peak"] / 1e6, held.server_peak / 1e6),
        "up_mb": (plan["wire"]["up"] / 1e6, timed["up"] / 1e6),
        "down_mb": (plan["wire"]["down"] / 1e6, timed["down"] / 1e6),
        "step_s": (plan["seconds"]["total"], timed["seconds"]),
    }
    return {name: {"plan": a, "real": b, "ratio": a / b} for name, (a, b) in pairs.items()}


def _errors(cases: Any, kind: str) -> list[float]:
    names = {"memory": ("client_mb", "server_mb"), "bytes": ("up_mb", "down_mb")}
    keys = names.get(kind, ("step_s",))
    return [abs(case[key]["ratio"] - 1) for case in cases for key in keys]


def _time_split(config: Config, pipe: Connection, steps: int) -> dict[str, float]:
    """Median step over gRPC, and the bytes of one."""
    pipe.send(to_json(config))
    ticket, node_key = pipe.recv()
    bottom, top = build_client(config)
    link = GrpcLink(ticket, node_key, steps=STEPS, config=config.link)
    place = Place(seed=0, client="bench", round=1, rounds=1)
    trainer = Trainer(bottom, top, link, STEPS, alone(config.train), place)
    rows, tokens = config.train.batch_size, config.data.context
    batches = [make_batch(rows, tokens, VOCABULARY) for _ in range(config.train.accumulate)]
    seconds = []
    for number in range(steps + 2):
        up, down, started = link.bytes_up, link.bytes_down, time.perf_counter()
        trainer.step(number, batches)
        seconds.append(time.perf_counter() - started)
    result = {"up": link.bytes_up - up, "down": link.bytes_down - down}
    link.close()
    return {**result, "seconds": statistics.median(seconds[2:])}


@contextmanager
def _trunk_process() -> Iterator[Connection]:
    """A process that serves the trunk of each configuration that it is sent, one after another."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(10)
        if process.is_alive():
            process.terminate()


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
    family, width, blocks, overrides = CASES[name]
    config = family_config(family, width, blocks, ["cut.bottom=2", "cut.top=1", *overrides])
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
    keys = {
        "client_mb": "client MB",
        "server_mb": "server MB",
        "up_mb": "MB up",
        "step_s": "step s",
    }
    rows = [
        [name, *(f"{c[k]['plan']:.3g} / {c[k]['real']:.3g} = {c[k]['ratio']:.3f}" for k in keys)]
        for name, c in result["cases"].items()
    ]
    return ["plan / real", *keys.values()], rows
