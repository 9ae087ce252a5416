"""A long training over a stream that breaks now and then: does memory stay flat?

``graft bench soak`` prints what `bench_soak` finds. The trunk and its one client are two processes;
there are rounds of training and evaluation, and in each a stream is cut.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch

from conf.schema import LinkConfig, TrainConfig
from flower_app.client import streamed
from flower_app.client.place import Place
from flower_app.data.client import Batch
from models import split
from models.tiny import VOCAB
from simulations.bench.trunk_process import CUT, TrunkProcess, llama, trunk_process
from simulations.disturb.faults import UP, Faults
from strategies.engine.engine import TrunkEngine
from strategies.transport.stream.link import GrpcLink

ROUND = 100
"""Steps of a round; one stream breaks in each."""

PERIOD = 50
"""Steps between two looks at the memory."""

FLAT = 2.0
"""MiB in 1,000 steps by which a process may grow and still be called flat."""

SKIPPED = 0.25
"""Share of the samples that count as start-up."""

FRAMES_OF_A_STEP = 3
BATCH, TOKENS = 4, 24
PROCESSES = ("server", "client")
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Memory after so many steps, in MiB: what would be free if the process ended (USS)."""

    step: int
    server: float
    client: float


@dataclass
class _Soak:
    """A client that lives as long as the soak, and what was seen of it."""

    trunk: TrunkProcess
    train: TrainConfig
    steps: int
    say: Callable[[str], None]
    samples: list[Sample] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    connections: int = 0
    breaks: int = 0
    done: int = 0
    left: int = 0
    """Sessions and bytes in flight after their client's good-bye, over all rounds."""

    def __post_init__(self) -> None:
        self._parts = split(llama({}), CUT)
        self._chance = random.Random(0)
        self._link = LinkConfig(tls="on", timeout=60.0, grace=10.0)

    def run(self) -> None:
        """All rounds, each with an evaluation at its end."""
        rounds = -(-self.steps // ROUND)
        for number in range(1, rounds + 1):
            count = min(ROUND, self.steps - self.done)
            self._round(number, rounds, count)
            self._evaluate(number)
            self.say(f"{self.done} of {self.steps} steps, {self.samples[-1]}")

    def _round(self, number: int, rounds: int, count: int) -> None:
        key = f"train-{number}"
        ticket = self.trunk.open_round(number, rounds, [key], training=True)[key]
        at = self._chance.randrange(FRAMES_OF_A_STEP * count)
        faults = Faults({(UP, at): "break"})
        link = GrpcLink(
            ticket, self.trunk.node_key, steps=count, config=self._link, interceptors=[faults]
        )
        place = Place(seed=0, client="soak", round=number, rounds=rounds)
        parts = self._parts
        trainer = streamed.Trainer(parts.bottom, parts.top, link, count, self.train, place)
        tokens = 0
        for step in range(count):
            loss, counted = trainer.step(step, [self._batch()])
            self.losses.append(loss)
            tokens += counted
            self.done += 1
            if self.done % PERIOD == 0 or self.done == self.steps:
                self._look()
        link.close()
        self.connections += link.connections
        self.breaks += sum(faults.met.values())
        self._close_round({key: float(tokens)})

    def _evaluate(self, number: int) -> None:
        key = f"evaluate-{number}"
        ticket = self.trunk.open_round(number, number, [key], training=False)[key]
        link = GrpcLink(ticket, self.trunk.node_key, steps=0, config=self._link)
        streamed.evaluate(
            self._parts.bottom, self._parts.top, link, [self._batch() for _ in range(3)], self.train
        )
        link.close()
        self._close_round({})

    def _close_round(self, weights: dict[str, float]) -> None:
        state = self.trunk.left()
        self.left += state.sessions + state.in_flight
        self.trunk.close_round(weights)

    def _batch(self) -> Batch:
        """Other tokens in every step, and another length."""
        generator = torch.Generator().manual_seed(self._chance.getrandbits(32))
        shape = (BATCH, self._chance.randint(TOKENS // 2, TOKENS))
        ids = torch.randint(3, VOCAB, shape, generator=generator)
        return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)

    def _look(self) -> None:
        self.samples.append(
            Sample(step=self.done, server=_own(self.trunk.process), client=_own(psutil.Process()))
        )


def bench_soak(
    steps: int = 2000,
    strategy: str = "splitfed-v1",
    say: Callable[[str], None] = lambda line: None,
    spoil: Callable[[TrunkEngine], None] | None = None,
) -> dict[str, Any]:
    """Train for so many steps over streams that break, and watch the memory of both processes.

    Parameters
    ----------
    steps : int
        Optimizer steps in all.
    strategy : str
        As ``train.strategy``.
    say : callable
        Takes a line on the progress.
    spoil : callable, optional
        See `trunk_process`.

    Returns
    -------
    dict
        The setting; for ``server`` and ``client`` memory first and last, the highest, and the slope
        in MiB by 1,000 steps over the last three quarters of the samples; ``flat``, if both slopes
        are below `FLAT`; ``clean``, if nothing was left after good-byes;
        connections, breaks and seconds.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    train = TrainConfig(strategy=strategy, lr=1e-3)
    with trunk_process(train, LinkConfig(tls="on", timeout=60.0, grace=10.0), {}, spoil) as trunk:
        soak = _Soak(trunk, train, steps, say)
        soak.run()
        threads, alive = trunk.state().threads, trunk.alive()
        trunk.stop()
        code = trunk.exit_code
    rows = {name: trend(soak.samples, name) for name in PROCESSES}
    return {
        "benchmark": "soak",
        "strategy": strategy,
        "steps": soak.done,
        "rounds": -(-steps // ROUND),
        "breaks": soak.breaks,
        "connections": soak.connections,
        "first_loss": round(soak.losses[0], 3),
        "last_loss": round(soak.losses[-1], 3),
        "samples": len(soak.samples),
        **rows,
        "flat_below": FLAT,
        "flat": all(row["mib_per_1000_steps"] < FLAT for row in rows.values()),
        "left_after_good_byes": soak.left,
        "sessions_alive": alive,
        "threads_left": threads,
        "clean": not (soak.left or alive or code),
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 1),
    }


def trend(samples: Sequence[Sample], process: str) -> dict[str, float]:
    """First, last and highest memory of a process, and its slope by least squares."""
    memory = [float(getattr(sample, process)) for sample in samples]
    late = int(len(samples) * SKIPPED)
    slope = 0.0
    if len(samples) - late > 1:
        steps = [sample.step for sample in samples[late:]]
        slope = float(np.polyfit(steps, memory[late:], 1)[0]) * 1000
    return {
        "first_mib": round(memory[0], 1),
        "last_mib": round(memory[-1], 1),
        "highest_mib": round(max(memory), 1),
        "mib_per_1000_steps": round(slope, 2),
    }


def _own(process: psutil.Process) -> float:
    own: int = process.memory_full_info().uss
    return own / _MIB
