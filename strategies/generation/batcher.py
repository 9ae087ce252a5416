"""One forward at a time on the trunk; single tokens that wait for it go together.

Sessions are served as they come, and nobody waits for others to fill a batch: while a forward runs,
the next tokens of other sessions arrive, and the following forward takes all of them (continuous
batching). Between two of them, one longer forward (a piece of a prompt) has its turn.

Shapes: B rows, T new positions, D hidden size.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.cached import PartCache
from models.parts import Part
from models.ragged import Ragged
from strategies.engine.meter import Meter
from strategies.errors import TrunkError

MOST_TOGETHER = 64
"""Texts of one forward."""


@dataclass(eq=False)
class Job:
    """One forward that a session waits for."""

    h_BTD: Tensor
    mask: Tensor | None
    """(B, L + T)."""
    positions_BT: Tensor | None
    cache: PartCache | None
    single: bool
    """A single token of a single text without padding."""
    done: Future[Tensor] = field(default_factory=Future)
    asked: float = field(default_factory=time.perf_counter)
    queued: float = 0.0
    """Seconds before the trunk had time for it."""


class Batcher:
    """Runs the trunk in a thread of its own.

    Parameters
    ----------
    part : Part
        The trunk.
    ragged : Ragged or None
        The same for single tokens of several texts; None: they go one by one.
    meter : Meter
        Told of the work.
    threads : int
        Torch threads; 0: torch's own choice.
    """

    def __init__(self, part: Part, ragged: Ragged | None, meter: Meter, threads: int = 0) -> None:
        self._part, self._ragged, self._meter, self._threads = part, ragged, meter, threads
        self._device = next(part.parameters()).device
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ending, self._ended = threading.Lock(), False
        self.forwards = self.texts = 0
        """How many there were, and texts of all of them."""
        self._thread = threading.Thread(target=self._work, daemon=True, name="graft-generation")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Forwards that wait."""
        return self._jobs.qsize()

    def run(self, job: Job) -> Tensor:
        """Wait for a forward; whatever it raises is raised here."""
        with self._ending:
            if self._ended:
                raise TrunkError("the server has stopped", kind="closed")
            self._jobs.put(job)
        return job.done.result()

    def stop(self) -> None:
        """End the thread; what still waits is done before."""
        with self._ending:
            self._ended = True
            self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        others: list[Job] = []
        over = False
        while others or not over:
            singles, last = self._gather(others)
            over = over or last
            if singles:
                self._forward(singles)
            if others:
                self._forward([others.pop(0)])

    def _gather(self, others: list[Job]) -> tuple[list[Job], bool]:
        """What waits now: single tokens, and the others behind those that waited before."""
        singles: list[Job] = []
        while len(singles) < MOST_TOGETHER:
            try:
                job = self._jobs.get(block=not (singles or others))
            except queue.Empty:
                break
            if job is None:
                return singles, True
            (singles if job.single and self._ragged else others).append(job)
        return singles, False

    def _forward(self, jobs: list[Job]) -> None:
        self.forwards, self.texts = self.forwards + 1, self.texts + len(jobs)
        run: Callable[[], Tensor] = lambda: self._alone(jobs[0])  # noqa: E731
        if len(jobs) > 1:
            run = lambda: self._all(jobs)  # noqa: E731
        tokens = sum(job.h_BTD.shape[0] * job.h_BTD.shape[1] for job in jobs)
        now = time.perf_counter()
        for job in jobs:
            job.queued = now - job.asked
        try:
            with torch.no_grad(), self._meter.work("forward", tokens):
                output = run()
        except Exception as error:  # noqa: BLE001  of a model's code: whoever waits is to hear it
            for job in jobs:
                job.done.set_exception(error)
            return
        for i, job in enumerate(jobs):
            job.done.set_result(output if len(jobs) == 1 else output[i : i + 1])

    def _alone(self, job: Job) -> Tensor:
        return self._part(
            job.h_BTD.to(self._device), job.mask, positions=job.positions_BT, cache=job.cache
        )

    def _all(self, jobs: list[Job]) -> Tensor:
        assert self._ragged is not None
        h_S1D = torch.cat([job.h_BTD for job in jobs]).to(self._device)
        return self._ragged.forward(h_S1D, [job.cache for job in jobs if job.cache is not None])
