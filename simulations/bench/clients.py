"""Several clients on one trunk, against the unsplit model on all cores: tokens a second."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch

from conf.schema import LinkConfig, TrainConfig
from conf.sections.link import read_codecs
from models import Cut, split
from simulations.bench.step import SplitStep, WholeStep, make_batch, make_model
from simulations.bench.worker import worker
from strategies.engine.engine import TrunkEngine
from strategies.engine.policies.registry import find_policy, policies
from strategies.optim import trainable
from strategies.transport import tickets
from strategies.transport.stream.service import TrunkService
from strategies.transport.tickets import Guest, Ticket

SIZES = {"blocks": 8, "hidden": 256, "vocabulary": 1024, "batch": 8, "tokens": 128}
"""Of the model, and of a micro-batch."""
CUT = Cut(bottom=1, top=1)
ROW = 3
"""Steps in a row."""
PATIENCE = 3600.0
"""Seconds a session may be silent while others are timed."""
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured."""

    clients: tuple[int, ...] = (1, 2, 4, 8)
    strategies: tuple[str, ...] = ()
    """Policies; none: all there are."""
    micros: int = 1
    window: int = 4
    codec: str = "fp32"
    turns: int = 3
    """Of which the median is told, after one that warms up."""
    client_threads: int = 1
    trunk_threads: int = 0
    """0: one where each session has a replica and works by itself, else all cores."""
    whole_threads: int = os.cpu_count() or 1


def bench_clients(
    asked: Asked,
    say: Callable[[str], None] = lambda line: None,
    sizes: dict[str, int] = SIZES,
) -> dict[str, Any]:
    """Time clients that train at once on one trunk, and the unsplit model, in turns.

    Each client, the trunk and the unsplit model is a process of its own. For each policy and number
    of clients, rows of steps of all clients at once take turns with rows of the unsplit model's, so
    that whatever else the machine does meets both. AdamW runs everywhere.

    Parameters
    ----------
    asked : Asked
        What is measured.
    say : callable
        Takes a line of progress.
    sizes : dict
        As `SIZES`.

    Returns
    -------
    dict
        The setting, and `rows`: of each policy and number of clients the median of tokens a second,
        the unsplit model's, their ratio, and what a session takes of the trunk's process, MiB,
        beside what its replica and AdamW's moments take in theory.
    """
    names = asked.strategies or tuple(policies())
    for name in names:
        find_policy(name)  # one that nobody offers is refused in this process, in words
    total, rows = 1 + asked.turns * ROW, []
    with ExitStack() as stack:
        whole = stack.enter_context(worker(_whole, asked, sizes, total * len(asked.clients) * 9))[0]
        clients = [
            stack.enter_context(worker(_client, asked, sizes, total))[0]
            for _ in range(max(asked.clients))
        ]
        for name in names:
            for count in asked.clients:
                say(f"{name}, {count} clients")
                rows.append(_measured(name, asked, sizes, total, whole, clients[:count]))
    return {
        "benchmark": "clients",
        **sizes,
        "cut": str(CUT),
        "micro_batches": asked.micros,
        "window": asked.window,
        "codec": asked.codec,
        "client_threads": asked.client_threads,
        "trunk_threads": asked.trunk_threads,
        "unsplit_threads": asked.whole_threads,
        "turns": asked.turns,
        "steps": asked.turns * ROW,
        "rows": rows,
    }


def link_config(asked: Asked) -> LinkConfig:
    """The link, on both sides."""
    return LinkConfig(codec=read_codecs(asked.codec), window=asked.window, timeout=PATIENCE)


def _train(asked: Asked, strategy: str) -> TrainConfig:
    return TrainConfig(lr=1e-4, accumulate=asked.micros, strategy=strategy)


def _measured(
    strategy: str,
    asked: Asked,
    sizes: dict[str, int],
    total: int,
    whole: Connection,
    clients: Sequence[Connection],
) -> dict[str, Any]:
    """One policy with so many clients."""
    count, tokens = len(clients), sizes["batch"] * sizes["tokens"] * asked.micros
    split_s: list[float] = []
    whole_s: list[float] = []
    with worker(_trunk, strategy, asked, sizes, count) as (trunk, _):
        found, node_key, replica, before = trunk.recv()
        for client, ticket in zip(clients, found, strict=True):
            client.send((strategy, ticket, node_key))
        for client in clients:
            client.recv()
        for numbers in [range(1), *(range(at, at + ROW) for at in range(1, total, ROW))]:
            for times, pipes in ((whole_s, [whole]), (split_s, clients)):
                started = time.perf_counter()
                for pipe in pipes:
                    pipe.send(numbers)
                for pipe in pipes:
                    pipe.recv()
                times.append((time.perf_counter() - started) / len(numbers))
        trunk.send("memory")
        session = (trunk.recv() - before) / count
        for client in clients:
            client.send(None)
            client.recv()
    ours, theirs = (statistics.median(each[1:]) for each in (split_s, whole_s))
    return {
        "strategy": strategy,
        "clients": count,
        "tokens_per_second": round(count * tokens / ours, 1),
        "unsplit_tokens_per_second": round(tokens / theirs, 1),
        "ratio": round(count * theirs / ours, 3),
        "session_mib": round(session / _MIB, 2),
        "replica_with_moments_mib": round(3 * replica / _MIB, 2) if replica else 0.0,
    }


def _whole(pipe: Connection, asked: Asked, sizes: dict[str, int], total: int) -> None:
    """The unsplit model: takes the steps that it is told to."""
    torch.set_num_threads(asked.whole_threads)
    batches = [make_batch(sizes, seed) for seed in range(asked.micros)]
    step, number = WholeStep(_train(asked, "splitfed-v1"), batches, total, sizes), 0
    while (numbers := _next(pipe)) is not None:
        for _ in numbers:
            step(number)
            number += 1
        pipe.send(True)


def _client(pipe: Connection, asked: Asked, sizes: dict[str, int], total: int) -> None:
    """A client: opens one session after another, and takes the steps that it is told to."""
    torch.set_num_threads(asked.client_threads)
    batches = [make_batch(sizes, seed) for seed in range(asked.micros)]
    link = link_config(asked)
    while (told := _next(pipe)) is not None:
        strategy, ticket, node_key = told
        train = _train(asked, strategy)
        step = SplitStep(train, link, batches, ticket, node_key, total, sizes, CUT)
        pipe.send(True)
        while (numbers := _next(pipe)) is not None:
            for number in numbers:
                step(number, last=number == numbers[-1])
            pipe.send(True)
        step.link.close()
        pipe.send(True)


def _next(pipe: Connection) -> Any:
    """What comes next; None when nothing does any more."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def _trunk(
    pipe: Connection, strategy: str, asked: Asked, sizes: dict[str, int], count: int
) -> None:
    """The trunk, with a ticket for each client."""
    part = split(make_model(sizes), CUT).trunk
    train = _train(asked, strategy)
    engine = TrunkEngine(part, hidden_size=part.hidden_size, train=train, timeout=PATIENCE)
    own = 1 if engine.policy.replicates else asked.whole_threads
    torch.set_num_threads(asked.trunk_threads or own)
    engine.open_round(1, 1, training=True, cohort=count)
    service = TrunkService(engine, link_config(asked))
    service.start()
    node_key, found = tickets.new_key(), list[Ticket]()
    for number in range(count):
        key = f"client-{number}"
        guest = Guest(key=key, client=key, public_key=tickets.public_half(node_key))
        found.append(service.ticket(guest))
    replica = sum(p.nbytes for p in trainable(part)) if engine.policy.replicates else 0
    h_BTD = torch.randn(sizes["batch"], sizes["tokens"], part.hidden_size, requires_grad=True)
    part(h_BTD, None).sum().backward()  # torch takes what it takes at first
    part.zero_grad()
    del h_BTD
    pipe.send((found, node_key, replica, _memory()))
    while _next(pipe) is not None:
        pipe.send(_memory())
    service.stop()


def _memory() -> int:
    """What this process holds for itself, bytes, once the allocator has given back what is free."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc alone can
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_full_info().uss)
