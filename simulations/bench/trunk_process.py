"""A trunk in a process of its own, for load and soak: told what to do, and asked how it fares."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.schema import LinkConfig, TrainConfig
from models import Cut, split
from models.tiny import tiny_config
from simulations.bench.worker import worker
from simulations.equality.fold import fold
from strategies.engine.engine import TrunkEngine
from strategies.engine.policies.registry import find_policy
from strategies.engine.session import Session
from strategies.memory import peak_bytes
from strategies.optim import trainable
from strategies.transport import tickets
from strategies.transport.stream.service import TrunkService
from strategies.transport.tickets import Guest, Ticket

CUT = Cut(bottom=1, top=1)
LEAVE_SECONDS = 10.0
"""For the trunk to notice that a client has left."""

STOP_SECONDS = 30.0
"""For the process to end after its service has stopped."""

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class State:
    """How the trunk's process fares at one moment. Memory in MiB."""

    rss: float
    own: float
    """What would be free if the process ended (USS)."""
    peak: float
    threads: int
    sessions: int
    in_flight: int
    """Bytes of activations whose step is not taken."""


class TrunkProcess:
    """The process, as seen from the one that started it."""

    def __init__(self, pipe: Connection, process: Any, node_key: bytes) -> None:
        self._pipe, self._process, self.node_key = pipe, process, node_key

    @property
    def process(self) -> psutil.Process:
        """The process itself, for whoever measures from outside."""
        return psutil.Process(self._process.pid)

    @property
    def exit_code(self) -> int | None:
        """Of the process, once it has ended."""
        code: int | None = self._process.exitcode
        return code

    def open_round(self, number: int, rounds: int, keys: list[str], *, training: bool) -> dict:
        """Begin a round; returns a ticket for each session."""
        tickets: dict[str, Ticket] = self._ask("open_round", number, rounds, keys, training)
        return tickets

    def close_round(self, weights: dict[str, float]) -> None:
        """End the round, and fold these sessions, by weight, into the trunk."""
        self._ask("close_round", weights)

    def state(self) -> State:
        """How it fares now."""
        state: State = self._ask("state")
        return state

    def left(self) -> State:
        """How it fares once its clients have said good-bye; to be asked before the round is closed,
        which ends the sessions of those who have not."""
        return self._wait(self.state, lambda state: not (state.sessions or state.in_flight))

    def alive(self) -> int:
        """Sessions that take memory, whether they are known or not; none after a round."""
        alive: int = self._wait(lambda: self._ask("alive"), lambda count: not count)
        return alive

    def trainable_bytes(self) -> int:
        """Of the trunk's trained weights: what a replica takes at least."""
        size: int = self._ask("trainable_bytes")
        return size

    def stop(self) -> float:
        """Stop the service and the process; returns the seconds it took."""
        started = time.perf_counter()
        self._ask("stop")
        self._process.join(STOP_SECONDS)
        return time.perf_counter() - started

    @staticmethod
    def _wait(look: Callable[[], Any], over: Callable[[Any], bool]) -> Any:
        deadline = time.monotonic() + LEAVE_SECONDS
        while not over(seen := look()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return seen

    def _ask(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, arguments))
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the trunk's process died of '{name}'") from None


@contextmanager
def trunk_process(
    train: TrainConfig,
    link: LinkConfig,
    sizes: dict[str, Any],
    spoil: Callable[[TrunkEngine], None] | None = None,
) -> Iterator[TrunkProcess]:
    """Serve the middle of a LLaMA in a new process, which ends with the context.

    Parameters
    ----------
    train, link : TrainConfig, LinkConfig
        Of the engine and its service.
    sizes : dict
        What the LLaMA's configuration changes of a tiny one.
    spoil : callable, optional
        Done to the engine first, by tests that want a bad one; a function of a module.
    """
    find_policy(train.strategy)  # a name that nobody offers is refused in this process, in words
    node_key = tickets.new_key()
    arguments = (train, link, sizes, tickets.public_half(node_key), spoil)
    with worker(_serve, *arguments, patience=5) as (pipe, process):
        yield TrunkProcess(pipe, process, node_key)


def llama(sizes: dict[str, Any]) -> PreTrainedModel:
    """The model that client and trunk share, the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config("llama", **sizes))


@dataclass
class _Server:
    """What the process does when it is asked."""

    engine: TrunkEngine
    service: TrunkService
    public_key: bytes
    keys: list[str] = field(default_factory=list)

    def open_round(
        self, number: int, rounds: int, keys: list[str], training: bool
    ) -> dict[str, Ticket]:
        self.engine.open_round(number, rounds, training=training, cohort=len(keys))
        guests = [Guest(key=key, client=key, public_key=self.public_key) for key in keys]
        return {guest.key: self.service.ticket(guest) for guest in guests}

    def close_round(self, weights: dict[str, float]) -> None:
        self.service.end_round()
        fold(self.engine, weights)

    def state(self) -> State:
        memory = psutil.Process().memory_full_info()
        return State(
            rss=memory.rss / _MIB,
            own=memory.uss / _MIB,
            peak=peak_bytes() / _MIB,
            threads=threading.active_count(),
            sessions=self.service.sessions(),
            in_flight=self.engine.in_flight.bytes,
        )

    def alive(self) -> int:
        gc.collect()
        return sum(type(each) is Session for each in gc.get_objects())

    def trainable_bytes(self) -> int:
        return sum(p.nbytes for p in trainable(self.engine.trunk))

    def stop(self) -> None:
        self.service.stop()


def _serve(
    pipe: Connection,
    train: TrainConfig,
    link: LinkConfig,
    sizes: dict[str, Any],
    public_key: bytes,
    spoil: Callable[[TrunkEngine], None] | None,
) -> None:
    torch.set_num_threads(1)
    trunk = split(llama(sizes), CUT).trunk
    engine = TrunkEngine(
        trunk, hidden_size=trunk.hidden_size, train=train, max_sequences=8, max_tokens=64
    )
    if spoil is not None:
        spoil(engine)
    service = TrunkService(engine, link)
    service.start()
    server = _Server(engine, service, public_key)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:  # whoever started it has gone
            service.stop()
            return
        pipe.send(getattr(server, name)(*arguments))
        if name == "stop":
            return
