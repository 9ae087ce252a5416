"""Many sessions at once on one trunk: does it hold, what does each cost, and is any left?

``graft bench load`` prints what `bench_load` finds. The trunk is in a process of its own; its
clients are threads of this one, each with a link of its own, over TLS.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from conf.schema import LinkConfig, TrainConfig
from simulations.bench.trunk_process import State, TrunkProcess, trunk_process
from strategies.errors import TrunkError
from strategies.transport.link import StepCounters
from strategies.transport.stream.link import GrpcLink
from strategies.transport.tickets import Ticket

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "head_dim": 32}
BATCH, TOKENS = 2, 16
WAIT = 120.0
"""Seconds within which all sessions must have opened, or have taken their steps."""

_MIB = 2**20


def bench_load(
    sessions: int = 64, steps: int = 5, strategy: str = "splitfed-v1", **sizes: Any
) -> dict[str, Any]:
    """Open so many sessions on one trunk, let all of them train at once, and close the round.

    Parameters
    ----------
    sessions, steps : int
        How many sessions, and optimizer steps of each.
    strategy : str
        As ``train.strategy``.
    **sizes : Any
        Changes to the sizes of the LLaMA.

    Returns
    -------
    dict
        The setting; ``errors``; ``steps_per_second`` over all sessions; the server's memory,
        threads and sessions before, with all sessions open and trained, after all good-byes, and
        after the round, and the same for one more such round; what a session takes, and what a
        replica's weights take in theory, alone and with AdamW's moments; seconds to stop and the
        process's exit code; ``clean``, if there was no error and nothing is left. Memory in MiB.
    """
    train, link = TrainConfig(strategy=strategy), LinkConfig(tls="on")
    sizes = {**SIZES, **sizes}
    hidden = int(sizes["hidden_size"])
    torch.set_num_threads(1)
    keys = [f"client-{number}" for number in range(sessions)]
    with trunk_process(train, link, sizes) as trunk:
        moments, crowds = _watch(trunk, keys, hidden, link, steps)
        alive, weights = trunk.alive(), trunk.trainable_bytes()
        seconds = trunk.stop()
        code = trunk.exit_code
    crowd, again = crowds
    errors = crowd.errors + again.errors
    left = [count for each in crowds for count in (each.left.sessions, each.left.in_flight)]
    return {
        "benchmark": "load",
        "strategy": strategy,
        "sessions": sessions,
        "steps": steps,
        "model": f"{sizes['num_hidden_layers']} x {hidden}, batches of {BATCH} x {TOKENS} tokens",
        "errors": len(errors),
        "first_errors": errors[:3],
        "steps_per_second": round(sessions * steps / crowd.seconds, 1),
        **{name: _row(state) for name, state in moments.items()},
        "session_mib": round((crowd.full.own - moments["before"].own) / sessions, 3),
        "replica_mib": round(weights / _MIB, 3),
        "replica_with_moments_mib": round(3 * weights / _MIB, 3),
        "stop_seconds": round(seconds, 2),
        "exit_code": code,
        "sessions_alive": alive,
        "clean": not (errors or any(left) or alive or code),
    }


def _watch(
    trunk: TrunkProcess, keys: list[str], hidden: int, link: LinkConfig, steps: int
) -> tuple[dict[str, State], tuple[_Crowd, _Crowd]]:
    """Two rounds of all, and the trunk at each moment of them."""
    first = trunk.state()
    # gRPC, TLS and torch load what they need at the first session, which is not a session's.
    _train(trunk, ["warm-up"], 1, 2, hidden, link, 1)
    before = trunk.state()
    crowd = _train(trunk, keys, 2, 2, hidden, link, steps)
    after = trunk.state()
    again = _train(trunk, keys, 3, 3, hidden, link, steps)
    moments = {
        "started": first,
        "before": before,
        "all sessions open": crowd.full,
        "all have left": crowd.left,
        "after": after,
        "all open again": again.full,
        "after again": trunk.state(),
    }
    return moments, (crowd, again)


@dataclass
class _Crowd:
    """What became of a round's clients."""

    full: State
    left: State
    """After all good-byes, before the round was closed."""
    seconds: float
    errors: list[str] = field(default_factory=list)


def _train(
    trunk: TrunkProcess,
    keys: list[str],
    number: int,
    rounds: int,
    hidden: int,
    link: LinkConfig,
    steps: int,
) -> _Crowd:
    """One round: all clients open, then all train, then the trunk is looked at, then all leave."""
    tickets = trunk.open_round(number, rounds, keys, training=True)
    meet = threading.Barrier(len(keys) + 1, timeout=WAIT)
    errors: list[str] = []

    def client(key: str) -> None:
        opened = None
        try:
            opened = _open(tickets[key], trunk.node_key, steps, link)
        except TrunkError as error:
            errors.append(f"{key}: {error}")
        meet.wait()
        if opened is not None:
            try:
                _steps(opened, steps, hidden)
            except TrunkError as error:
                errors.append(f"{key}: {error}")
        meet.wait()
        meet.wait()
        if opened is not None:
            try:
                opened.close()
            except TrunkError as error:
                errors.append(f"{key}: {error}")

    with ThreadPoolExecutor(len(keys), thread_name_prefix="graft-load") as pool:
        clients = [pool.submit(client, key) for key in keys]
        meet.wait()
        started = time.perf_counter()
        meet.wait()
        seconds = time.perf_counter() - started
        full = trunk.state()
        meet.wait()
    for each in clients:
        each.result()
    left = trunk.left()
    trunk.close_round(dict.fromkeys(keys, 1.0) if not errors else {})
    return _Crowd(full, left, seconds, errors)


def _open(ticket: Ticket, node_key: bytes, steps: int, link: LinkConfig) -> GrpcLink:
    return GrpcLink(ticket, node_key, steps=steps, config=link)


def _steps(link: GrpcLink, steps: int, hidden: int) -> None:
    """What a client's link sees of training."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        h_BTD = torch.randn(BATCH, TOKENS, hidden, generator=generator)
        link.compute(step, 0, h_BTD, None)
        h_BTD = link.computed()
        count = BATCH * TOKENS
        link.backward(step, 0, h_BTD / h_BTD.numel(), None, last=True, tokens=count)
        link.gradients()
        link.apply(step, StepCounters(client_square_norm=0.1, tokens=count, loss=1.0))
        link.applied()


def _row(state: State) -> dict[str, Any]:
    return {
        "rss_mib": round(state.rss, 1),
        "own_mib": round(state.own, 1),
        "peak_mib": round(state.peak, 1),
        "threads": state.threads,
        "sessions": state.sessions,
        "in_flight_bytes": state.in_flight,
    }
