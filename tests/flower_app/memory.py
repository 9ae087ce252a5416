"""A server in a process of its own, and all that lies in that process's memory. Linux only."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor, nn

from conf.schema import Config
from flower_app.build import resolve_model
from flower_app.runs import recorder as recorder_module
from flower_app.runs.recorder import Recorder
from flower_app.server_app import run_experiment
from strategies.aggregate.joint import JointModel
from tests.flower_app.grid import InProcessGrid

PAGE = 4096

Array = np.ndarray[Any, Any]


@dataclass
class Held:
    """What the server has, when it is looked at."""

    arrays: list[Array]
    """Of its objects."""
    memory: Array
    """All bytes that were not there when the first client was asked to train."""


class Distant(InProcessGrid):
    """Its clients are in the process at the other end of a pipe."""

    pipe: Connection

    def _deliver(self, message: Message) -> Message | None:
        self.pipe.send(message)
        return self.pipe.recv()  # type: ignore[no-any-return]


def _serve(pipe: Connection) -> None:
    """The server's process: runs what it is told to, and lets itself be looked at."""
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 1)
    torch.set_num_threads(1)
    recorder_module.plot_loss = lambda folder: None
    update = JointModel.update

    def watched(*args: Any) -> Any:
        _be_looked_at(pipe)  # the answers are here, and not yet averaged
        return update(*args)

    JointModel.update = watched  # type: ignore[method-assign]
    while (task := pipe.recv()) is not None:
        config, clients = task
        grid = Distant(clients)
        grid.pipe = pipe
        recorder = Recorder(resolve_model(config), say=lambda line: None)
        recorder.start()
        recorder.finish(run_experiment(resolve_model(config), grid, recorder))
        _be_looked_at(pipe)
        pipe.send(None)


def _be_looked_at(pipe: Connection) -> None:
    pipe.send(_arrays())
    pipe.recv()


def _arrays() -> list[Array]:
    """All tensors and arrays that an object has, in copy."""
    objects = gc.get_objects()
    found = {id(each): each for each in [*objects, *gc.get_referents(*objects)]}.values()
    tensors = [each.detach() for each in found if type(each) in (Tensor, nn.Parameter)]
    arrays = [each for each in found if type(each) is np.ndarray and each.dtype.kind in "iuf"]
    floats = (each.double() if each.is_floating_point() else each for each in tensors)
    return [*(each.numpy() for each in floats), *arrays]


class Server:
    """The process, seen from the clients'."""

    def __init__(self, pipe: Connection, pid: int) -> None:
        self._pipe, self._pid = pipe, pid
        self._known: set[int] = set()

    def run(self, config: Config, grid: InProcessGrid) -> list[Held]:
        """Train with the clients of a grid.

        Returns what the server held whenever a round's answers had come, and when all was over.
        """
        self._known.clear()
        seen = []
        self._pipe.send((config, grid.clients))
        while (asked := self._pipe.recv()) is not None:
            if isinstance(asked, list):
                seen.append(Held(asked, self._new()))
                self._pipe.send(None)
                continue
            if asked.metadata.message_type == "train" and not self._known:
                self._new()
            self._pipe.send(grid._deliver(asked))
        return seen

    def stop(self) -> None:
        """End the process."""
        self._pipe.send(None)

    def _new(self) -> Array:
        new = []
        for page in _pages(self._pid):
            if (digest := hash(page)) not in self._known:
                self._known.add(digest)
                new.append(page)
        return np.frombuffer(b"".join(new), np.uint8)


@contextmanager
def server_apart() -> Iterator[Server]:
    """A process in which no client has ever been."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,))
    process.start()
    there.close()
    assert process.pid is not None
    server = Server(here, process.pid)
    try:
        yield server
        server.stop()
        process.join(10)
    finally:
        process.kill()


def _pages(pid: int) -> Iterator[bytes]:
    """Every page that the process may write to, and has."""
    folder = Path(f"/proc/{pid}")
    maps = (line.split()[:2] for line in (folder / "maps").read_text().splitlines())
    places = [place.split("-") for place, rights in maps if rights.startswith("rw")]
    with (folder / "mem").open("rb", 0) as memory, (folder / "pagemap").open("rb", 0) as there:
        for start, end in ((int(a, 16) // PAGE, int(b, 16) // PAGE) for a, b in places):
            there.seek(8 * start)
            present = np.frombuffer(there.read(8 * (end - start)), "<u8") >> 62
            for first, last in _runs(present > 0):
                memory.seek(PAGE * (start + first))
                data = memory.read(PAGE * (last - first))
                yield from (data[at : at + PAGE] for at in range(0, len(data), PAGE))


def _runs(flags: np.ndarray[Any, np.dtype[np.bool_]]) -> Iterator[tuple[int, int]]:
    """Where flags are set, from and to."""
    edges = np.flatnonzero(np.diff(np.pad(flags.astype(np.int8), 1)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
