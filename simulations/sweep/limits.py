"""How many points run at a time: cores by what Ray is given, memory as measured."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from conf.schema import Config
from simulations.launch.machine import MEBIBYTE, look_at_machine
from simulations.launch.watcher import marked
from simulations.sweep.task import Task

SHARE = 0.9
"""Of the memory that is free when a sweep begins: what points may take if nobody says."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What all running points may take together."""

    jobs: int
    """Points at a time; 0: as many as cores and memory allow."""
    cores: int
    memory_mb: float

    def admit(self, running: Sequence[Task], need: dict[str, int], id: str, peak_mb: float) -> bool:
        """Return whether one more point may start.

        Parameters
        ----------
        running : sequence of Task
            Those that are being run.
        need : dict
            Cores of each point.
        id : str
            The next point.
        peak_mb : float
            The most that any point was measured to take; 0: none has been, up to its first round.
        """
        if not running:
            return True
        if self.jobs:
            return len(running) < self.jobs
        taken = sum(need[task.point.id] for task in running)
        fits = peak_mb * (len(running) + 1) <= self.memory_mb
        return peak_mb > 0 and fits and taken + need[id] <= self.cores


def find_limits(jobs: int = 0, cores: int = 0, memory_gb: float = 0.0) -> Limits:
    """Return the limits of a sweep on this machine; 0 stands for what it has."""
    free = psutil.virtual_memory().available
    if (limit := read_memory_limit()) is not None:
        free = min(free, limit)
    return Limits(
        jobs=jobs,
        cores=cores or look_at_machine().cpus,
        memory_mb=memory_gb * 1024 or SHARE * free / MEBIBYTE,
    )


def read_memory_limit(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return how many bytes the control group of this process may still take; None: all."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no limit is written as "max"
            most = int((folder / limit).read_text())
            return most - int((folder / used).read_text()) if most < 2**60 else None
    return None


def cores_needed(config: Config, clients: int, cores: int) -> int:
    """Return how many cores a simulated run keeps busy at once, at least.

    Parameters
    ----------
    config : Config
        The run's.
    clients : int
        Simulated.
    cores : int
        That there are: what torch takes if nobody limits its threads.
    """
    at_once = clients if needs_all(config) else 1
    runtime = config.runtime
    return max(runtime.trunk_threads or cores, at_once * (runtime.client_threads or cores))


def needs_all(config: Config) -> bool:
    """Return whether a run's clients must all work at the same time."""
    from strategies.engine.policies.registry import find_policy  # with torch, which takes a while

    policy = find_policy(config.train.strategy)
    return config.link.transport == "stream" and policy.needs_all_at_once(config.train)


def federation_of(config: Config, clients: int, cores: int) -> str:
    """Return what `flwr run` is told of the simulation of a point that has so many cores."""
    threads = config.runtime.client_threads or cores
    at_once = clients if needs_all(config) else max(1, min(clients, cores // threads))
    return f"num-supernodes={clients} client-resources-num-cpus=1 init-args-num-cpus={at_once}"


def measure(task: Task) -> float:
    """Return how much memory a point's processes have now, in MB; 0: none is there.

    Pages that several processes share count for each: it errs on the safe side.
    """
    total = 0
    for process in marked(task.mark) if task.mark else ():
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total / MEBIBYTE
